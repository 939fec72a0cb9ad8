"""Curves over updates, from the runs' metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.report.figures import literal_text, smooth
from common.report.paper.page import CURVES, Page
from common.report.paper.style import WIDTH, legend, note, panels, style
from common.run.run_folder import RunFolder

USUAL = ("reward", "length", "test_accuracy")


@literal_text
def over_updates(page: Page) -> Figure:
    """What metrics.jsonl has, over updates: the mean over seeds and the range of all of them as a band."""
    names, rows = page.axis("panels"), page.axis("rows")
    runs = {panel: {row: _runs(page, row, panel) for row in rows} for panel in names}
    return _draw(runs, page.sweep.page["curves"])


@literal_text
def of_runs(named: Mapping[str, Sequence[Path]]) -> Figure:
    """The same of run folders by what they are called: reward, length and accuracy."""
    return _draw({"": named}, USUAL)


def _draw(runs: Mapping[str, Mapping[str, Sequence[Path]]], wanted: Sequence[str]) -> Figure:
    """A line of axes per panel, with a line of each name in all of them."""
    figure, axes = panels(len(runs) * len(wanted), 2.4, WIDTH, len(wanted))
    for panel_number, (panel, named) in enumerate(runs.items()):
        logs = {name: [RunFolder(path).read_log("metrics.jsonl") for path in paths] for name, paths in named.items()}
        for curve_number, curve in enumerate(wanted):
            axis = axes[panel_number * len(wanted) + curve_number]
            for number, (name, seeds) in enumerate(logs.items()):
                found = [values for lines in seeds if (values := series(lines, curve))]
                _curve(axis, found, name, number, smoothed=curve.endswith("reward"))
            axis.set(xlabel="update", ylabel=CURVES[curve][1])
            axis.grid(alpha=0.25)
            note(axis, panel)
    legend(figure, axes)
    return figure


def _runs(page: Page, row: str, panel: str) -> list[Path]:
    wanted = [row, panel]
    runs = (each for each in page.sweep.runs if [page.place(each.keys, part) for part in ("rows", "panels")] == wanted)
    return [page.sweep.path(each) for each in runs]


def series(lines: Iterable[Mapping[str, float]], curve: str) -> dict[int, float]:
    """The value of a curve by update, of the lines of a metrics.jsonl."""
    keys, values = CURVES[curve][0], dict[int, float]()
    for line in lines:
        tested = sorted(name for name in line if name.startswith("eval/") and name.endswith("/accuracy"))
        names = [name for name in keys if name in line] if keys else tested
        if names:
            values[int(line["step"])] = line[names[0]] * (1 if keys else 100)
    return values


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
