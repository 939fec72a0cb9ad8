"""Compare runs in tables: a row per group of seeds and split, with notes on what is missing."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from common.report.folders import ASKED, Run, SeedGroup, configuration
from common.report.statistics import compare_groups, interval, mean_std
from common.types import UserError

# Output on a terminal.


def show_table(found: Table, title: str = "") -> None:
    """Print a table and its notes."""
    console = Console(width=None if Console().is_terminal else 200)
    left_out: list[str] = []
    while True:
        table = _rich(found, title, left_out)
        natural = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
        more = next((name for name in DISPENSABLE if name in found.columns and name not in left_out), None)
        if natural <= console.width or more is None:
            break
        left_out.append(more)
    console.print(table)
    notes = (
        [f"left out for the width of this terminal: {', '.join(left_out)} (--format csv has all)"] if left_out else []
    )
    for note in [*found.notes, *notes]:
        console.print(Text(note))


def _rich(found: Table, title: str, left_out: Collection[str]) -> RichTable:
    table = RichTable(title=title or None)
    kept = [number for number, column in enumerate(found.columns) if column not in left_out]
    for number in kept:
        table.add_column(found.columns[number], justify="left" if number < 2 else "right")
    for row in found.rows:
        table.add_row(*(Text(row[number]) for number in kept))
    return table


# The table itself.

MACRO = "class mean"  # this column is shown only if some row has classes of unequal sizes
COLUMNS = (
    "run",
    "split",
    "seeds",
    "images",
    "accuracy",
    "± std",
    "95 % interval",
    MACRO,
    "before",
    "official",
    "seconds",
)
# columns that a narrow terminal does not show, the first ones first
DISPENSABLE = ("seconds", "official", "images", MACRO, "before", "± std", "seeds")
AGAINST = ("difference", "95 % interval of it", "p")
FORMATS = ("rich", "markdown", "csv", "latex")


@dataclass(frozen=True)
class Table:
    """A table: cells as text, and notes below them."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: list[str]


def build(groups: Sequence[SeedGroup], strangers: Sequence[Run] = (), against: str | None = None) -> Table:
    """Build the comparison.

    Args:
        groups: Groups in the order of the rows.
        strangers: Folders that belong to no group.
        against: Part of the label of the group that the others are compared with, on the same images.

    Raises:
        UserError: No group has this label, or several.
    """
    base = None if against is None else _named(groups, against)
    rows = [row for group in groups for row in _rows(group, base)]
    columns = COLUMNS + (AGAINST if base else ())
    at = columns.index(MACRO)
    if all(row[at] == "–" for row in rows):
        columns, rows = (*columns[:at], *columns[at + 1 :]), [(*row[:at], *row[at + 1 :]) for row in rows]
    return Table(columns, rows, [*_missing(groups), *_repeated(groups), *_unfinished(groups, strangers)])


def complete(groups: Sequence[SeedGroup], strangers: Sequence[Run] = ()) -> bool:
    """Tell whether every folder holds a finished run, or a preview by manifest=true."""
    whole = all(run.state == ASKED for run in strangers)
    return whole and all(run.result is not None for group in groups for run in group.runs)


def render(table: Table, how: str) -> str:
    """Return the table as Markdown, CSV or LaTeX (booktabs)."""
    if how == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([table.columns, *table.rows])
        return text.getvalue()
    if how == "markdown":
        lines = [table.columns, ("---",) * len(table.columns), *table.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return "\n".join([body, "", *(f"- {note}" for note in table.notes)]).rstrip() + "\n"
    head = " & ".join(map(_latex, table.columns)) + r" \\"
    body = "\n".join(" & ".join(map(_latex, row)) + r" \\" for row in table.rows)
    notes = "".join(f"% {note}\n" for note in table.notes)
    begin = f"\\begin{{tabular}}{{ll{'r' * (len(table.columns) - 2)}}}"
    return notes + "\n".join([begin, r"\toprule", head, r"\midrule", body, r"\bottomrule", r"\end{tabular}", ""])


def _named(groups: Sequence[SeedGroup], part: str) -> SeedGroup:
    found = [group for group in groups if part in group.label]
    # a method's name may be part of another's, so exact matches win
    exact = [
        group
        for group in found
        if part in (group.label, group.label.split(" · ")[0].split(" ")[0], *(run.path.name for run in group.runs))
    ]
    found = exact or found
    if len(found) != 1:
        names = "; ".join(group.label for group in found or groups)
        raise UserError(f"--against {part!r} must be a part of one row's name alone, not of {len(found)}: {names}")
    return found[0]


def _rows(group: SeedGroup, base: SeedGroup | None) -> list[tuple[str, ...]]:
    finished = [run.result for run in group.finished if run.result is not None]
    if not finished:
        return [(group.label, "–", _seeds(group), *("–" for _ in COLUMNS[3:]), *("" for _ in AGAINST if base))]
    rows = []
    for split in dict.fromkeys(split for result in finished for split in result.final):
        summaries = [result.final[split] for result in finished if split in result.final]
        accuracies = [summary.accuracy for summary in summaries]
        mean, std = mean_std(accuracies)
        # columns beside the accuracy; a dash where no run has the value
        remarks = any(result.remarks for result in finished)
        trained = any(result.after for result in finished)
        macro = group.over_seeds(split, lambda summary: summary.accuracy_macro)
        before = group.over_seeds(split, lambda summary: summary.accuracy, "before") if trained else []
        official = group.over_seeds(split, lambda summary: summary.accuracy_official)
        seconds = [_seconds(result.train["seconds"]) for result in finished if "seconds" in result.train]
        # over seeds and images; of one seed over its images only
        bounds = interval(accuracies, [(summary.ci95[0], summary.ci95[1]) for summary in summaries], most=1.0)
        assert bounds is not None, "accuracies are of images"
        row = (
            group.label,
            split,
            _seeds(group),
            str(summaries[0].n),
            _percent(mean) + (" †" if remarks else ""),
            "–" if std is None else _percent(std),
            f"{_percent(bounds[0])} – {_percent(bounds[1])}" + ("" if std is not None else " (of images)"),
            _percent(mean_std(macro)[0]) if macro else "–",
            _percent(mean_std(before)[0]) if before else "–",
            _percent(mean_std(official)[0]) if official else "–",
            f"{mean_std(seconds)[0]:.0f}" if seconds else "–",
        )
        rows.append(row + (_against(group, base, split) if base else ()))
    return rows


def _seconds(phases: Mapping[str, float]) -> float:
    """Return the seconds of a run without loading the model, which the first run of a sweep may have built."""
    return sum(seconds for phase, seconds in phases.items() if phase != "model")


def _against(group: SeedGroup, base: SeedGroup, split: str) -> tuple[str, ...]:
    found = None if group is base else compare_groups(group, base, split)
    if found is None:
        return ("", "", "")
    low, high = found.interval
    p = "other images" if found.p is None else f"{found.p:.2g}"
    return f"{100 * found.difference:+.2f}", f"{100 * low:+.2f} – {100 * high:+.2f}", p


def _seeds(group: SeedGroup) -> str:
    """Return the seeds of a group, those without a result in brackets."""
    return ", ".join(str(run.values["seed"]) if run.result else f"({run.values['seed']})" for run in group.runs)


def _missing(groups: Sequence[SeedGroup]) -> list[str]:
    """Return notes on seeds that only other groups have."""
    everywhere = {seed for group in groups for seed in group.seeds}
    return [
        f"{group.label}: no run of seed {', '.join(str(seed) for seed in sorted(everywhere - set(group.seeds)))}"
        for group in groups
        if everywhere - set(group.seeds)
    ]


def _repeated(groups: Sequence[SeedGroup]) -> list[str]:
    """Return notes on seeds of one configuration that several folders hold."""
    places: dict[tuple[str, int], list[str]] = {}
    for group in groups:
        for run in group.runs:
            places.setdefault((configuration(run), run.values["seed"]), []).append(str(run.path))
    return [
        f"seed {seed} was run {len(paths)} times, which is no further seed, so each has a row: {', '.join(paths)}"
        for (_, seed), paths in places.items()
        if len(paths) > 1
    ]


def _unfinished(groups: Sequence[SeedGroup], strangers: Sequence[Run]) -> list[str]:
    runs = [run for group in groups for run in group.runs if run.result is None]
    remarks = sorted({line for group in groups for run in group.finished if run.result for line in run.result.remarks})
    return [
        *(f"†: {line}" for line in remarks),
        *(f"{run.path}: {run.state}, {run.why}" for run in [*runs, *strangers]),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _latex(text: str) -> str:
    for character in "\\&%$#_{}":
        text = text.replace(character, r"\textbackslash{}" if character == "\\" else f"\\{character}")
    for character, command in (
        ("±", r"$\pm$"),
        ("·", r"$\cdot$"),
        ("–", "--"),
        ("†", r"$\dagger$"),
        ("~", r"\textasciitilde{}"),
        ("^", r"\textasciicircum{}"),
    ):
        text = text.replace(character, command)
    return text
