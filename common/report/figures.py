"""The two pictures of a run folder: learning curves and the confusion matrix. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#2f6db3", "#d9822b", "#5a9e5a", "#9467bd")
GREY = "#8a8a8a"
LEGIBLE = 40  # classes that a matrix can show with names and counts
PAIRS = 25  # confusions shown of more classes


def curves(metrics: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Reward (or loss) and completion length over updates, and every accuracy that was measured.

    Args:
        metrics: Lines of metrics.jsonl.
        title: Of the figure.
        path: PNG to write.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    rows = [row for row in metrics if "loss" in row]
    rewards = sorted({key for row in rows for key in row if key.startswith("rewards/") and key.endswith("/mean")})
    for name, colour in zip(rewards or ["loss"] * bool(rows), cycle(COLOURS), strict=False):
        # later updates over the same rollout batch have no rewards of their own
        steps, values = zip(*[(row["step"], row[name]) for row in rows if name in row], strict=True)
        left.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        label = name.removeprefix("rewards/").removesuffix("/mean")
        left.plot(steps, smooth(values), color=colour, linewidth=2, label=label)
    left.set(xlabel="update", ylabel="mean reward" if rewards else "loss (nats per token)")
    accuracies = sorted(
        {key for row in metrics for key in row if key.startswith("eval/") and key.endswith("/accuracy")}
    )
    for name, colour in zip(accuracies, cycle(COLOURS), strict=False):
        points = [(row["step"], 100 * row[name]) for row in metrics if name in row]
        right.plot(*zip(*points, strict=True), color=colour, marker="o", label=f"accuracy, {name.split('/')[1]}")
    right.set(xlabel="update", ylabel="accuracy (%)", ylim=(0, 100))
    lengths = [(row["step"], row["completions/mean_length"]) for row in rows if "completions/mean_length" in row]
    if lengths:
        other = right.twinx()
        other.plot(*zip(*lengths, strict=True), color=GREY, linewidth=1, alpha=0.8)
        other.set_ylabel("completion length (tokens)", color=GREY)
        other.set_ylim(bottom=0)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:  # an evaluation alone has no curve on the left
            axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start.

    >>> smooth([1.0, 1.0])
    [1.0, 1.0]
    """
    out, mean = [], 0.0
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**count))
    return out


def confusion(table: Sequence[Sequence[int]], names: Sequence[str], title: str, path: Path) -> None:
    """Which classes are taken for which: all counts of few classes, the most frequent confusions of many.

    Args:
        table: Counts of [true class][answered class], the last column answers that are no class name.
        names: Of the classes.
        title: Of the figure.
        path: PNG to write.
    """
    figure = _matrix(table, names) if len(names) <= LEGIBLE else _pairs(table, names)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _matrix(table: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    columns = [*names, "other"]
    side = max(5, 0.32 * len(names))
    figure, axis = plt.subplots(figsize=(side + 0.8, side), layout="constrained")
    shares = [[count / max(1, sum(row)) for count in row] for row in table]
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set(xlabel="answered", ylabel="true")
    axis.set_xticks(range(len(columns)), columns, rotation=90)
    axis.set_yticks(range(len(names)), names)
    for y, row in enumerate(table):
        for x, count in enumerate(row):
            colour = "white" if shares[y][x] > 0.5 else "black"
            if count:
                axis.text(x, y, str(count), ha="center", va="center", fontsize=7, color=colour)
    return figure


def _pairs(table: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    columns = [*names, "no class name"]
    wrong = ((count, y, x) for y, row in enumerate(table) for x, count in enumerate(row) if count and x != y)
    found = sorted(wrong, key=lambda each: (-each[0], each[1:]))[:PAIRS]
    figure, axis = plt.subplots(figsize=(9, 1.6 + 0.24 * max(1, len(found))), layout="constrained")
    places = range(len(found))
    axis.barh(places, [count for count, *_ in found], color=COLOURS[0])
    axis.set_yticks(places, [f"{names[y]} → {columns[x]}" for _, y, x in found], fontsize=8)
    for place, (count, y, _) in enumerate(found):
        axis.text(count, place, f" {count} of {sum(table[y])}", va="center", fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel=f"images; the {len(found)} most frequent confusions, true → answered")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.12)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
