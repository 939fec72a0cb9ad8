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
    """The curves of one run, whose log is long and is let go."""
    lines = RunFolder(path).read_log("metrics.jsonl")
    return {curve: series(lines, curve) for curve in wanted}


def _runs(page: Page, row: str, panel: str) -> list[Path]:
    wanted = [row, panel]
    runs = (each for each in page.sweep.runs if [page.place(each.keys, part) for part in ("rows", "panels")] == wanted)
    return [page.sweep.path(each) for each in runs]


def series(lines: Sequence[Mapping[str, float]], curve: str) -> dict[int, float]:
    """The value of a curve by update, of the lines of a metrics.jsonl; an accuracy is of one split, see `watched`."""
    keys, values = CURVES[curve][0], dict[int, float]()
    known = keys or watched(lines)
    for line in lines:
        name = next((name for name in known if name in line), None)
        if name is not None:
            values[int(line["step"])] = line[name] * (1 if keys else 100)
    return values


def watched(lines: Iterable[Mapping[str, float]]) -> list[str]:
    """The accuracy that was measured most often, of the validation images if there are two; none without any."""
    counts: dict[str, int] = {}
    for line in lines:
        for name in line if "loss" not in line else ():  # an update measures no accuracy
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
