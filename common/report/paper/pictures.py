"""Draw the figure of a page: figure.png, figure.svg, figure.pdf in the sweep's folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.report.figures import (
    OKABE_ITO,
    PRINT,
    WIDTH,
    legend,
    literal_text,
    note,
    panels,
    save_picture,
    smooth,
    style,
)
from common.report.paper.page import CURVES, Page, TableCell
from common.run.run_folder import RunFolder, best_effort

# Colours are Okabe and Ito's, which colour-blind readers can tell apart; every series also has a marker and a line
# style, for grey prints. Figures have no title: captions say what they show.


matplotlib.use("Agg")

logging.getLogger("fontTools").setLevel(logging.WARNING)  # it logs every step of writing a PDF


# Curves over updates, from the runs' metrics.jsonl.

USUAL = ("reward", "length", "test_accuracy")


@literal_text
def over_updates(page: Page) -> Figure:
    """Draw curves of metrics.jsonl over updates: the mean over seeds, and the range over seeds as a band."""
    names, rows = page.axis("panels"), page.axis("rows")
    runs = {panel: {row: _runs(page, row, panel) for row in rows} for panel in names}
    return _draw(runs, page.sweep.page["curves"])


@literal_text
def curves_of_runs(named: Mapping[str, Sequence[Path]]) -> Figure:
    """Draw reward, length and accuracy of run folders, by label."""
    return _draw({"": named}, USUAL)


def _draw(runs: Mapping[str, Mapping[str, Sequence[Path]]], wanted: Sequence[str]) -> Figure:
    """Draw a row of axes per panel, with a line for each label in all of them."""
    figure, axes = panels(len(runs) * len(wanted), 2.4, WIDTH, len(wanted))
    for panel_number, (panel, named) in enumerate(runs.items()):
        beside = axes[panel_number * len(wanted) : (panel_number + 1) * len(wanted)]
        for number, (name, paths) in enumerate(named.items()):
            seeds = [_all(path, wanted) for path in paths]
            for axis, curve in zip(beside, wanted, strict=True):
                found = [values[curve] for values in seeds if values[curve]]
                _curve(axis, found, name, number, smoothed=curve.endswith("reward"))
        for axis, curve in zip(beside, wanted, strict=True):
            axis.set(xlabel="update", ylabel=CURVES[curve][1])
            axis.grid(alpha=0.25)
            note(axis, panel)
    legend(figure, axes)
    return figure


def _all(path: Path, wanted: Sequence[str]) -> dict[str, dict[int, float]]:
    """Return the curves of one run; its long log is not kept."""
    lines = RunFolder(path).read_log("metrics.jsonl")
    return {curve: series(lines, curve) for curve in wanted}


def _runs(page: Page, row: str, panel: str) -> list[Path]:
    wanted = [row, panel]
    runs = (each for each in page.sweep.runs if [page.place(each.keys, part) for part in ("rows", "panels")] == wanted)
    return [page.sweep.path(each) for each in runs]


def series(lines: Sequence[Mapping[str, float]], curve: str) -> dict[int, float]:
    """Return the value of a curve by update, from lines of metrics.jsonl; for accuracy see `watched`."""
    keys, values = CURVES[curve][0], dict[int, float]()
    known = keys or watched(lines)
    for line in lines:
        name = next((name for name in known if name in line), None)
        if name is not None:
            values[int(line["step"])] = line[name] * (1 if keys else 100)
    return values


def watched(lines: Iterable[Mapping[str, float]]) -> list[str]:
    """Return the accuracy that was measured most often; of two, that of the validation images; none without any."""
    counts: dict[str, int] = {}
    for line in lines:
        for name in line if "loss" not in line else ():  # lines of updates have no accuracy
            if name.startswith("eval/") and name.endswith("/accuracy"):
                counts[name] = counts.get(name, 0) + 1
    return sorted(counts, key=lambda name: (-counts[name], name != "eval/val/accuracy"))[:1]


def _curve(axis: Axes, seeds: Sequence[Mapping[int, float]], label: str, number: int, smoothed: bool) -> None:
    steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
    if not steps:
        return
    table = np.array([[values[step] for step in steps] for values in seeds])  # [S, updates]
    if smoothed:
        table = np.array([smooth(line) for line in table.tolist()])
    look = style(number) | {"marker": "" if len(steps) > 20 else style(number)["marker"]}
    axis.plot(steps, table.mean(0), label=label, linewidth=1.2, markersize=3.5, **look)
    axis.fill_between(steps, table.min(0), table.max(0), color=look["color"], alpha=0.15, linewidth=0)


# Figures by kind of page. Published numbers are hollow.


def draw(page: Page, folder: Path) -> None:
    """Draw the figure for the page's kind. A failure only logs a warning."""
    kind = page.sweep.page.get("kind", "table")
    if kind == "examples" or not page.entries:  # nothing to draw
        return
    painter = PAINTERS[kind]
    with best_effort("the figure"), matplotlib.rc_context(PRINT):
        save_picture(painter(page), folder / "figure")


@literal_text
def over_shots(page: Page) -> Figure:
    """Draw accuracy over shots, a line per method, the standard deviation over seeds as a band; a panel per dataset."""
    names = page.axis("panels")
    figure, axes = panels(len(names), 2.8)
    for axis, panel in zip(axes, names, strict=True):
        # averages are columns as well, but not numbers of shots
        shots = [column for column in page.axis("columns") if column.isdecimal()]
        at = {column: number for number, column in enumerate(shots)}
        for number, row in enumerate(page.axis("rows")):
            entries = [(at[c], page.at(rows=row, columns=c, panels=panel)) for c in shots]
            ours = [(x, e.ours, e.std or 0.0) for x, e in entries if e is not None and e.ours is not None]
            if ours:
                x, mean, std = map(np.array, zip(*ours, strict=True))
                axis.plot(x, mean, label=row, markersize=4, linewidth=1.2, **style(number))
                axis.fill_between(x, mean - std, mean + std, color=style(number)["color"], alpha=0.15, linewidth=0)
            _hollow(axis, [(x, e.published) for x, e in entries if e is not None], number, line=True)
        axis.set_xticks(range(len(shots)), shots)
        axis.set(xlabel="training images per class", ylabel="accuracy (%)")
        note(axis, panel)
    legend(figure, axes)
    return figure


def _hollow(axis: Axes, places: Sequence[tuple[float, float | None]], number: int, line: bool = False) -> None:
    """Draw published numbers with hollow markers."""
    known = [(x, y) for x, y in places if y is not None]
    if known:
        look = style(number)
        options: Any = {"markerfacecolor": "none", "markersize": 5, "linewidth": 0.6, "alpha": 0.7}
        axis.plot(
            *zip(*known, strict=True),
            color=look["color"],
            marker=look["marker"],
            linestyle=":" if line else "",
            **options,
        )


@literal_text
def dots(page: Page) -> Figure:
    """Draw every number as a dot with its interval. The table's columns become rows, its rows have a marker each; with
    `marks: panels` each panel has a marker instead, and each column its own axes.
    """
    by_panel = page.sweep.page.get("marks") == "panels"
    lines, series, parts = ("rows", "panels", "columns") if by_panel else ("columns", "rows", "panels")
    ticks, marked, names = page.axis(lines), page.axis(series), page.axis(parts)
    figure, axes = panels(len(names), 0.8 + len(ticks) * max(0.24, 0.1 * len(marked)), 1.3 * WIDTH, 3)
    for axis, part in zip(axes, names, strict=True):
        if axis is not axes[0]:
            axis.sharex(axes[0])
        for number, mark in enumerate(marked):
            # shift the series apart, so that their dots do not overlap
            offset = (number - (len(marked) - 1) / 2) * 0.6 / max(1, len(marked))
            look, label = style(number) | {"linestyle": ""}, mark
            for y, tick in enumerate(ticks):
                entry = page.at(**{lines: tick, series: mark, parts: part})
                if entry is not None and entry.ours is not None:
                    error = _error(entry)
                    axis.errorbar(entry.ours, y + offset, xerr=error, markersize=4, capsize=1.5, label=label, **look)
                    label = ""
                if entry is not None and entry.published is not None:
                    hollow = look | {"markerfacecolor": "none", "markersize": 5, "alpha": 0.7}
                    axis.plot(entry.published, y + offset, **hollow)
        axis.set_yticks(range(len(ticks)), ticks)
        axis.set_ylim(len(ticks) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
        axis.set(xlabel="accuracy (%) with its 95 % interval; hollow: published")
        note(axis, part)
    legend(figure, axes)
    return figure


def _error(entry: TableCell) -> Any:
    if entry.interval is None or entry.ours is None:
        return None
    return [[max(0.0, entry.ours - entry.interval[0])], [max(0.0, entry.interval[1] - entry.ours)]]


@literal_text
def bars(page: Page) -> Figure:
    """Draw a panel per column and a bar per row, for numbers of different kinds, such as accuracy and minutes."""
    columns, rows = page.axis("columns"), page.axis("rows")
    figure, axes = panels(len(columns), 0.7 + 0.3 * len(rows), 0.8 * WIDTH)
    for axis, column in zip(axes, columns, strict=True):
        entries = [page.at(rows=row, columns=column, panels="") for row in rows]
        for y, entry in enumerate(entries):
            if entry is not None and entry.ours is not None:
                axis.barh(
                    y,
                    entry.ours,
                    color=OKABE_ITO[0],
                    alpha=0.75,
                    height=0.6,
                    xerr=_error(entry),
                    error_kw={"linewidth": 0.8, "capsize": 2},
                )
                # written below the bar, where neither bar nor interval hides it
                axis.text(0, y + 0.42, f" {entry.ours:.4g}", ha="left", va="center", fontsize=6)
            if entry is not None and entry.published is not None:
                axis.plot(entry.published, y, color=OKABE_ITO[1], marker="D", markerfacecolor="none", markersize=5)
        axis.set_yticks(range(len(rows)), rows if axis is axes[0] else [""] * len(rows))
        axis.invert_yaxis()
        axis.set(xlabel=f"{column or 'accuracy (%)'}; diamond: published", ylim=(len(rows) - 0.5, -0.5))
    return figure


@literal_text
def gains(page: Page) -> Figure:
    """Draw a heat map per panel: trained on (rows), tested on (columns), points gained or lost."""
    columns, names = page.axis("columns"), page.axis("panels")
    rows = page.axis("rows")
    figure, axes = panels(len(names), 1.2 + 0.3 * len(rows), 1.4 + 0.42 * len(columns), 2)
    grids = [
        [[_value(page.at(rows=row, columns=column, panels=panel)) for column in columns] for row in rows]
        for panel in names
    ]
    largest = max((abs(v) for grid in grids for line in grid for v in line if not np.isnan(v)), default=1.0)
    for axis, panel, grid in zip(axes, names, grids, strict=True):
        image = axis.imshow(grid, cmap="PuOr", vmin=-largest, vmax=largest, aspect="auto")
        axis.set_xticks(range(len(columns)), columns, rotation=90)
        axis.set_yticks(range(len(rows)), rows)
        axis.set(xlabel="tested on", ylabel="trained on")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if not np.isnan(value):
                    colour = "#ffffff" if abs(value) > 0.6 * largest else "#111111"  # not black, which pages replace
                    axis.text(x, y, f"{value:+.1f}", ha="center", va="center", fontsize=6, color=colour)
        axis.spines[:].set_visible(False)
        note(axis, panel)
    figure.colorbar(image, ax=axes, label="points", shrink=0.8)
    return figure


def _value(entry: TableCell | None) -> float:
    return float("nan") if entry is None or entry.ours is None else entry.ours


PAINTERS: dict[str, Callable[[Page], Figure]] = {
    "table": dots,
    "shots": over_shots,
    "bars": bars,
    "gain": gains,
    "training": over_updates,
}
