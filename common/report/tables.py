"""The table a run ends with, from its metrics.json. No torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.counted import agree, counted
from common.data.notes import data_lines
from common.evaluation.summary import Summary
from common.run.result import Result
from common.training.silent import fix

REMARK = " †"  # behind an accuracy that a line below the table says more about


def percent(share: float | None) -> str:
    """A share of 1 as percent with two decimals; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.2f}"


def interval(summary: Summary) -> str:
    """The 95 % interval in percent."""
    low, high = summary.ci95
    return f"{percent(low)} – {percent(high)}"


def phases(result: Result, split: str) -> list[tuple[str, Summary]]:
    """The summaries of a split by what they are called: before training, and after it if there was any."""
    summaries = [("zero-shot", result.before[split])]
    return [*summaries, ("trained", result.after[split])] if result.after else summaries


def result_table(result: Result) -> Table:
    """Before and after training, per split."""
    title = f"{result.method} · {result.data} · {result.model} · {counted(result.shots, 'shot')} · seed {result.seed}"
    where = "" if result.setting == "few_shot" else f" · {result.setting}"
    splits = " / ".join(dict.fromkeys(result.origins.values()))
    title = f"{title}{where} · {result.protocol} · {splits}"
    table = Table(title=Text(title, style="table.title"), title_justify="left")
    columns, rows = result_cells(result)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for name, *cells in rows:
        table.add_row(Text(name), *cells)
    return table


def result_cells(result: Result) -> tuple[list[str], list[list[str]]]:
    """Names of columns, and a row per split and phase."""
    columns: dict[str, Callable[[Summary], str]] = {
        "images": lambda s: str(s.n),
        "accuracy %": lambda s: percent(s.accuracy),
        "95 % interval": interval,
        "official match %": lambda s: percent(s.accuracy_official),
        "well-formed %": lambda s: percent(s.well_formed),
        "tokens": lambda s: "–" if s.mean_tokens is None else f"{s.mean_tokens:.1f}",
        "seconds": lambda s: f"{s.seconds:.1f}",
    }
    summaries = [summary for split in result.before for _, summary in phases(result, split)]
    about = {"official match %": "accuracy_official", "well-formed %": "well_formed", "tokens": "mean_tokens"}
    shown = {
        name: text
        for name, text in columns.items()
        if name not in about or any(getattr(summary, about[name]) is not None for summary in summaries)
    }
    rows = []
    for split in result.before:
        for phase, summary in phases(result, split):
            mark = REMARK if result.remarks and (phase == "trained" or not result.after) else ""
            cells = {name: text(summary) + (mark if name == "accuracy %" else "") for name, text in shown.items()}
            rows.append([f"{split}, {phase}", *cells.values()])
    return ["split", *shown], rows


def probability_lines(result: Result) -> list[str]:
    """How often the most probable name is right, one line per split; none without label scoring."""
    lines = []
    for split in result.before:
        texts = [
            f"{phase} {percent(p.top1)} % (top-5 {percent(p.top5)}, ECE {percent(p.ece)})"
            for phase, summary in phases(result, split)
            if (p := summary.probability) is not None
        ]
        if texts:
            lines.append(f"{split}, most probable name: {', '.join(texts)}")
    return lines


def overall_lines(result: Result) -> list[str]:
    """One number for several splits, and what was left out."""
    lines = [f"†: {remark}" for remark in result.remarks]
    for name, before in result.overall["before"].items():
        after = f", trained {percent(result.overall['after'][name])} %" if result.after else ""
        lines.append(f"{name.replace('_', ' ')}: zero-shot {percent(before)} %{after}")
    for split in result.before:
        accuracies = [
            (phase, s.accuracy_aliases) for phase, s in phases(result, split) if s.accuracy_aliases is not None
        ]
        if accuracies:
            shown = ", ".join(f"{phase} {percent(accuracy)} %" for phase, accuracy in accuracies)
            lines.append(f"{split}, other words accepted: {shown}")
    lines += training_lines(result)
    if short := result.short_classes:
        name, count = next(iter(short.items()))
        many = f"{counted(len(short), 'class')} {agree(len(short), 'has', 'have')}"
        lines.append(f"{many} fewer training images than shots, first: '{name}' has {count}")
    if result.left_out:
        many, were = counted(result.left_out, "picture"), agree(result.left_out, "was", "were")
        lines.append(f"{many} that cannot be decoded {were} left out (manifest.json names them)")
    return lines


def training_lines(result: Result) -> list[str]:
    """Which update "trained" is, and which rewards taught nothing."""
    best, lines = result.train.get("best"), []
    if best:
        where = "val" if best["split"] == "val" else f"{best['split']} itself: no validation images"
        tested = result.train.get("tested", result.train["updates"])
        last = result.train.get("last")  # earlier versions did not say
        lines.append(
            f"trained: update {tested} of {result.train['updates']}; the best evaluation was after update"
            f" {best['update']} ({percent(best['accuracy'])} % on {where}"
            + (f"; after the last one {percent(last['accuracy'])} %)" if last else ")")
        )
    for name, whom in result.train.get("silent_rewards", {}).items():
        lines.append(f"reward '{name}' paid {whom} in all updates: {fix(name, whom)}")
    return lines


def paired_lines(result: Result) -> list[str]:
    """The paired comparison on the same images, one line per split."""
    lines = []
    for split, test in result.train.get("paired", {}).items():
        low, high = (100 * bound for bound in test["ci95"])
        lines.append(
            f"{split}: {100 * test['difference']:+.2f} points [{low:+.2f}, {high:+.2f}] on the same images; fixed"
            f" {test['fixed']}, broke {test['broken']}; McNemar p = {test['p_value']:.2g}"
        )
    return lines


def time_line(result: Result) -> str:
    """Seconds per phase."""
    return "seconds: " + ", ".join(f"{phase} {value:.1f}" for phase, value in result.train["seconds"].items())


def show(result: Result, folder: Path, console: Console | None = None) -> None:
    """Print the result of a run to standard output."""
    console = console or Console(width=None if Console().is_terminal else 120)
    console.print(result_table(result))
    lines = [*overall_lines(result), *data_lines(vars(result)), *probability_lines(result), *paired_lines(result)]
    for line in [*lines, time_line(result)]:
        console.print(Text(line))  # names are no markup
    console.print(Text(f"run folder: {folder}"), soft_wrap=True)
    if (folder / "report.html").is_file():
        console.print(Text(f"every reply, to look at: {folder / 'report.html'}"), soft_wrap=True)
    if offline := sorted((folder / "wandb").glob("**/offline-run-*")):
        console.print(Text(f"W&B was offline; upload it with: wandb sync {offline[-1]}"), soft_wrap=True)
