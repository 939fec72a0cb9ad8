"""The table a run ends with, from its metrics.json. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def percent(share: float) -> str:
    """A share of 1 as percent with two decimals."""
    return f"{100 * share:.2f}"


def interval(summary: dict[str, Any]) -> str:
    """The 95 % interval in percent."""
    low, high = summary["ci95"]
    return f"{percent(low)} – {percent(high)}"


def result_table(result: dict[str, Any]) -> Table:
    """Zero-shot and after training, per split."""
    title = (
        f"{result['method']} · {result['data']} · {result['model']} · {result['shots']} shots · seed {result['seed']}"
    )
    where = "" if result["setting"] == "few_shot" else f" · {result['setting']}"
    splits = " / ".join(dict.fromkeys(result["origins"].values()))
    table = Table(title=f"{title}{where} · {result['protocol']} · {splits}", title_justify="left")
    table.add_column("split")
    for name in ("images", "accuracy %", "95 % interval", "official match %", "well-formed %", "tokens", "seconds"):
        table.add_column(name, justify="right")
    trained = result["train"]["updates"] > 0
    for split, after in result["eval"].items():
        rows = [("zero-shot", result["zero_shot"][split])] + ([("trained", after)] if trained else [])
        for phase, summary in rows:
            table.add_row(
                f"{split}, {phase}",
                str(summary["n"]),
                percent(summary["accuracy"]),
                interval(summary),
                percent(summary["accuracy_official"]),
                percent(summary["well_formed"]),
                f"{summary['mean_tokens']:.1f}",
                f"{summary['seconds']:.1f}",
            )
    return table


def probability_lines(result: dict[str, Any]) -> list[str]:
    """How often the most probable name is right, one line per split; none without label scoring."""
    trained = result["train"]["updates"] > 0
    lines = []
    for split, after in result["eval"].items():
        phases = [("zero-shot", result["zero_shot"][split])] + ([("trained", after)] if trained else [])
        found = [
            f"{phase} {percent(p['top1'])} % (top-5 {percent(p['top5'])}, ECE {percent(p['ece'])})"
            for phase, summary in phases
            if (p := summary.get("probability"))
        ]
        if found:
            lines.append(f"{split}, most probable name: {', '.join(found)}")
    return lines


def overall_lines(result: dict[str, Any]) -> list[str]:
    """One number for several splits, and what was left out."""
    trained = result["train"]["updates"] > 0
    lines = []
    for name, before in result["overall"]["zero_shot"].items():
        after = f", trained {percent(result['overall']['eval'][name])} %" if trained else ""
        lines.append(f"{name.replace('_', ' ')}: zero-shot {percent(before)} %{after}")
    for split, after in result["eval"].items():
        if "accuracy_aliases" in after:
            before = result["zero_shot"][split]["accuracy_aliases"]
            trained_too = f", trained {percent(after['accuracy_aliases'])} %" if trained else ""
            lines.append(f"{split}, other words accepted: zero-shot {percent(before)} %{trained_too}")
    best = result["train"].get("best")
    if best and best["split"] != "val":
        lines.append(f"best update {best['update']} was chosen on {best['split']} itself: no validation images")
    if short := result["short_classes"]:
        name, count = next(iter(short.items()))
        lines.append(f"{len(short)} classes have fewer training images than shots, first: '{name}' has {count}")
    if result["left_out"]:
        lines.append(f"{result['left_out']} pictures that cannot be decoded were left out (manifest.json names them)")
    return lines


def paired_lines(result: dict[str, Any]) -> list[str]:
    """The paired comparison on the same images, one line per split."""
    lines = []
    for split, test in result["train"].get("paired", {}).items():
        low, high = (100 * bound for bound in test["ci95"])
        lines.append(
            f"{split}: {100 * test['difference']:+.2f} points [{low:+.2f}, {high:+.2f}] on the same images; fixed"
            f" {test['fixed']}, broke {test['broken']}; McNemar p = {test['p_value']:.2g}"
        )
    return lines


def time_line(result: dict[str, Any]) -> str:
    """Seconds per phase."""
    seconds = result["train"]["seconds"]
    return "seconds: " + ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())


def show(result: dict[str, Any], folder: Path, console: Console | None = None) -> None:
    """Print the result of a run to standard output."""
    console = console or Console(width=None if Console().is_terminal else 120)
    console.print(result_table(result))
    for line in [*overall_lines(result), *probability_lines(result), *paired_lines(result), time_line(result)]:
        console.print(line, highlight=False)
    console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)
