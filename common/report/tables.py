"""Build the table that a run ends with, from its metrics.json. No torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shlex import quote

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.counted import agree, counted
from common.data.manifest import data_lines
from common.data.sampling import too_few
from common.evaluation import metrics, novelty
from common.evaluation.metrics import Summary
from common.few_shot import doubts
from common.report import folders
from common.report.folders import photos
from common.run.result import Result
from common.training.signs import CUT, at, cut_line, fix

PHASES = (("zero-shot", "before"), ("trained", "after"))  # label of each phase, and its name in a result
TELLING = 200  # images from which on a calibration error is more than chance
REMARK = " †"  # after an accuracy with a remark below the table


def percent(share: float | None) -> str:
    """Format a share as percent with two decimals; a dash for None."""
    return "–" if share is None else f"{100 * share:.2f}"


def interval(summary: Summary) -> str:
    """Format the 95 % interval in percent."""
    low, high = summary.ci95
    return f"{percent(low)} – {percent(high)}"


def phases(result: Result, split: str) -> list[tuple[str, Summary]]:
    """Return the summaries of a split with their labels: before training, if there is one, and after it."""
    measured = ((said, getattr(result, phase)) for said, phase in PHASES)
    return [(said, summaries[split]) for said, summaries in measured if split in summaries]


def result_table(result: Result, data: str | None = None) -> Table:
    """Return a table of before and after training, per split. `data`: label of the dataset instead of its name."""
    shots = counted(result.shots, "shot")
    title = f"{result.method} · {data or result.data} · {result.model} · {shots} · seed {result.seed}"
    where = "" if result.setting == "few_shot" else f" · {result.setting}"
    splits = " / ".join(dict.fromkeys(result.origins.values()))
    title = f"{title}{where} · {result.protocol} · {splits}"
    return _table(*result_cells(result), title)


def _table(columns: list[str], rows: list[list[str]], title: str = "") -> Table:
    table = Table(title=Text(title, style="table.title") if title else None, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for name, *cells in rows:
        table.add_row(Text(name), *cells)
    return table


def result_cells(result: Result) -> tuple[list[str], list[list[str]]]:
    """Return the names of columns, and a row per split and phase; columns without values are left out."""
    columns: dict[str, Callable[[Summary], str]] = {
        "images": lambda s: str(s.n),
        "accuracy %": lambda s: percent(s.accuracy),
        "95 % interval": interval,
        "class mean %": lambda s: percent(s.accuracy_macro),
        "official match %": lambda s: percent(s.accuracy_official),
        "well-formed %": lambda s: percent(s.well_formed),
        "tokens": lambda s: "–" if s.mean_tokens is None else f"{s.mean_tokens:.1f}",
        "seconds to answer": lambda s: f"{s.seconds:.1f}",
    }
    # drop columns that are empty for this kind of learner
    summaries = [summary for split in result.final for _, summary in phases(result, split)]
    about = {
        "class mean %": "accuracy_macro",
        "official match %": "accuracy_official",
        "well-formed %": "well_formed",
        "tokens": "mean_tokens",
    }
    shown = {
        name: text
        for name, text in columns.items()
        if name not in about or any(getattr(summary, about[name]) is not None for summary in summaries)
    }
    rows = []
    for split in result.final:
        for phase, summary in phases(result, split):
            # remarks concern the final weights only
            mark = REMARK if result.remarks and (phase == "trained" or not result.after) else ""
            cells = {name: text(summary) + (mark if name == "accuracy %" else "") for name, text in shown.items()}
            rows.append([f"{split}, {phase}", *cells.values()])
    return ["split", *shown], rows


def leaderboard_cells(result: Result) -> tuple[list[str], list[list[str]]] | None:
    """Return the learners that cross-validation compared, the best first, as names of columns and rows; None if none.

    The intervals are those of one classification of every image; that several repeats were averaged is not counted.
    """
    found: list[list[str]] = []
    for summary in result.final.values():
        chosen = summary.facts.get("chosen", {})
        validated = chosen.get("cross_validated")
        if validated is None:
            continue
        rows = sorted(validated["learners"], key=lambda row: -row["accuracy"])
        first = rows[0]["learner"] == chosen["learner"]
        note = " (chosen)" if first else " (chosen: none is clearly ahead of it)"
        for row in rows:
            values = {name: value for name, value in row.items() if name not in ("learner", "accuracy")}
            low, high = metrics.wilson_interval(round(row["accuracy"] * validated["images"]), validated["images"])
            mark = note if row["learner"] == chosen["learner"] else ""
            setting = ", ".join(f"{name}={value:g}" for name, value in values.items())
            interval = f"{percent(low)} – {percent(high)}"
            found.append([row["learner"] + mark, setting, percent(row["accuracy"]), interval])
        return ["learner", "setting", "cross-validated %", "95 % interval"], found
    return None


def calibration_lines(result: Result) -> list[str]:
    """Return how far confidences are from accuracies, as they are and calibrated, one line per test split."""
    found = result.calibration
    if not found:
        return []
    where = {"folds": "cross-validated", "val": "validation"}[found["source"]]
    lines = [novelty.line(result.novelty)] if result.novelty else []

    def few(split: str) -> bool:
        return result.final[split].n < TELLING

    return [
        f"{split}, confidence: off by {percent(before)} % on average, by {percent(after)} % once calibrated"
        f" (ECE; fitted on {counted(found['n'], f'{where} image')}"
        + (f"; {counted(result.final[split].n, 'test image')} can hardly show it)" if few(split) else ")")
        for split, (before, after) in found["ece"].items()
        if split != found["source"]
    ] + lines


def fusion_lines(result: Result) -> list[str]:
    """Return how a fusion compares with the draft and the model alone, one line per test split (alert/fusion.py)."""
    lines = []
    for split, summary in result.final.items():
        if (found := summary.facts.get("fusion")) is None or split == "val":
            continue
        shares = ", ".join(f"{name} {percent(found[name])} %" for name in ("draft", "alert", "fused"))
        tests = (found["against_draft"]["p_value"], found["against_alert"]["p_value"])
        lines.append(f"{split}: {shares} (fused against draft p = {tests[0]:.2g}, against alert p = {tests[1]:.2g})")
    return lines


def probability_lines(result: Result) -> list[str]:
    """Return the accuracy of the most probable name, one line per split; none without label scoring."""
    lines = []
    for split in result.final:
        texts = [
            f"{phase} {percent(p.top1)} % (top-5 {percent(p.top5)}, ECE {percent(p.ece)})"
            for phase, summary in phases(result, split)
            if (p := summary.probability) is not None
        ]
        if texts:
            lines.append(f"{split}, most probable name: {', '.join(texts)}")
    return lines


def overall_lines(result: Result) -> list[str]:
    """Return lines on truncated replies, numbers for several splits, training, and classes or images left out."""
    lines = cut_replies(result) + [f"†: {remark}" for remark in result.remarks]
    # numbers for several splits
    measured = [(said, result.overall[phase]) for said, phase in PHASES if phase in result.overall]
    for name in measured[-1][1] if measured else ():
        shown = ", ".join(f"{said} {percent(numbers[name])} %" for said, numbers in measured)
        lines.append(f"{name.replace('_', ' ')}: {shown}")
    # accuracy if aliases count as right
    for split in result.final:
        accuracies = [
            (phase, s.accuracy_aliases) for phase, s in phases(result, split) if s.accuracy_aliases is not None
        ]
        if accuracies:
            shown = ", ".join(f"{phase} {percent(accuracy)} %" for phase, accuracy in accuracies)
            lines.append(f"{split}, other words accepted: {shown}")
    lines += training_lines(result)
    if short := result.short_classes:
        lines.append(too_few(short, result.shots))
    if result.left_out:
        many, were = counted(result.left_out, "picture"), agree(result.left_out, "was", "were")
        lines.append(f"{many} that cannot be decoded {were} left out (manifest.json names them)")
    return lines


def cut_replies(result: Result) -> list[str]:
    """Return a line for each evaluation with many truncated replies: a truncated answer is wrong."""
    return [
        cut_line(summary.truncated, None, f"the replies to {split}, {phase},")
        for split in result.before
        for phase, summary in phases(result, split)
        if summary.truncated is not None and summary.truncated >= CUT
    ]


def training_lines(result: Result) -> list[str]:
    """Return lines on which update was tested, and which rewards taught nothing."""
    best, lines = result.train.get("best"), []
    cut = result.train.get("cut")
    if cut:
        lines.append(cut_line(cut["share"], cut["limit"]))
    if planned := result.train.get("planned"):
        lines.append(f"stopped by patience after {result.train['updates']} of {counted(planned, 'update')}")
    if best:
        where = "val" if best["split"] == "val" else f"{best['split']} itself: no validation images"
        tested, last = result.train["tested"], result.train["last"]
        lines.append(
            f"trained: update {tested} of {result.train['updates']}; the best evaluation was {at(best['update'])}"
            f" ({percent(best['accuracy'])} % on {where}"
            f"; after the last one {percent(last['accuracy'])} %)"
        )
    # the sign `cut` would repeat the line on truncated completions above
    lines += [line for name, line in result.train.get("signs", {}).items() if not (cut and name == "cut")]
    share = cut["share"] if cut else 0.0
    for name, value in result.train.get("constant_rewards", {}).items():
        lines.append(f"reward '{name}' was {value} in all updates: {fix(name, value, share)}")
    return lines


def paired_lines(result: Result) -> list[str]:
    """Return the paired comparison on the same images, one line per split."""
    lines = []
    for split, test in result.train.get("paired", {}).items():
        low, high = (100 * bound for bound in test["ci95"])
        lines.append(
            f"{split}: {100 * test['difference']:+.2f} points [{low:+.2f}, {high:+.2f}] on the same images; fixed"
            f" {test['fixed']}, broke {test['broken']}; McNemar p = {test['p_value']:.2g}"
        )
    return lines


def time_line(result: Result) -> str:
    """Return a line with the seconds per phase."""
    spent = (f"{phase} {value:.1f}" for phase, value in result.train["seconds"].items())
    return f"seconds of the run: {', '.join(spent)}"


def show(result: Result, folder: Path, console: Console | None = None) -> None:
    """Print the result of a run to standard output."""
    console = console or Console(width=None if Console().is_terminal else 140)
    values = folders.read_run(folder).values
    console.print(result_table(result, photos(values) if values else None))
    if (compared := leaderboard_cells(result)) is not None:
        console.print(_table(*compared))
        console.print(Text("stronger encoders with a hub, and reasons with a GPU: docs/photos.md"))
    lines = [*overall_lines(result), *data_lines(vars(result)), *probability_lines(result)]
    lines += [*fusion_lines(result), *calibration_lines(result), *paired_lines(result)]
    for line in [*lines, time_line(result)]:
        console.print(Text(line))  # as Text: square brackets in names are not markup
    console.print(Text(f"run folder: {folder}"), soft_wrap=True)
    if (folder / "report.html").is_file():
        console.print(Text(f"every reply, to look at: {folder / 'report.html'}"), soft_wrap=True)
    if (folder / doubts.FILE).is_file():
        count = len(doubts.read(folder / doubts.FILE))
        where = folder / "doubts.html"
        console.print(Text(f"what may be wrong with the photos ({count}), to look at: {where}"), soft_wrap=True)
    if offline := sorted((folder / "wandb").glob("**/offline-run-*")):  # one for every attempt
        paths = " ".join(quote(str(path)) for path in offline)
        console.print(Text(f"W&B was offline; upload it with: wandb sync {paths}"), soft_wrap=True)
