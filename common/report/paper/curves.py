"""Curves over updates, from the runs' metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.report.figures import literal_text, smooth
from common.report.paper.page import CURVES, Page
from common.report.paper.style import WIDTH, legend, note, panels, style
from common.run.run_folder import RunFolder


@literal_text
def over_updates(page: Page) -> Figure:
    """What metrics.jsonl has, over updates: the mean over seeds and the range of all of them as a band."""
    names, wanted = page.axis("panels"), page.sweep.page["curves"]
    figure, axes = panels(len(names) * len(wanted), 2.4, WIDTH, len(wanted))
    for panel_number, panel in enumerate(names):
        for curve_number, curve in enumerate(wanted):
            axis = axes[panel_number * len(wanted) + curve_number]
            for number, row in enumerate(page.axis("rows")):
                _curve(axis, series(page, row, panel, curve), row, number, smoothed=curve.endswith("reward"))
            axis.set(xlabel="update", ylabel=CURVES[curve][1])
            axis.grid(alpha=0.25)
            note(axis, panel)
    legend(figure, axes)
    return figure


def series(page: Page, row: str, panel: str, curve: str) -> list[dict[int, float]]:
    """Of every seed: the value of a curve by update."""
    found = []
    for shown in page.sweep.runs:
        if [page.place(shown.keys, part) for part in ("rows", "panels")] != [row, panel]:
            continue
        keys, values = CURVES[curve][0], dict[int, float]()
        for line in RunFolder(page.sweep.path(shown)).read_log("metrics.jsonl"):
            tested = sorted(name for name in line if name.startswith("eval/") and name.endswith("/accuracy"))
            names = [name for name in keys if name in line] if keys else tested
            if names:
                values[line["step"]] = line[names[0]] * (1 if keys else 100)
        if values:
            found.append(values)
    return found


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
