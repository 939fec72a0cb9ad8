"""The two pictures of a run folder: learning curves and the confusion matrix. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLUE, ORANGE, GREY = "#2f6db3", "#d9822b", "#8a8a8a"


def curves(metrics: Sequence[dict[str, Any]], zero_shot: float, final: float, title: str, path: Path) -> None:
    """Reward (or loss) and completion length over updates; evaluation accuracy where it was measured.

    Args:
        metrics: Lines of metrics.jsonl.
        zero_shot: Accuracy before training, share of 1.
        final: Accuracy after training.
        title: Of the figure.
        path: PNG to write.
    """
    rows = [row for row in metrics if "loss" in row]
    steps = [row["step"] for row in rows]
    rewards = sorted({key for row in rows for key in row if key.startswith("rewards/") and key.endswith("/mean")})
    names = rewards or ["loss"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for name, colour in zip(names, (BLUE, ORANGE, GREY, "#5a9e5a"), strict=False):
        values = [row[name] for row in rows]
        left.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        left.plot(
            steps, smooth(values), color=colour, linewidth=2, label=name.removeprefix("rewards/").removesuffix("/mean")
        )
    left.set(xlabel="update", ylabel="mean reward" if rewards else "loss (nats per token)")
    left.legend(frameon=False)
    evaluated = [
        (row["step"], row[key])
        for row in metrics
        for key in row
        if key.startswith("eval/") and key.endswith("/accuracy")
    ]
    points = [(0, zero_shot), *evaluated, (steps[-1] if steps else 0, final)]
    right.plot([p[0] for p in points], [100 * p[1] for p in points], color=BLUE, marker="o", label="accuracy, test")
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
    right.legend(frameon=False, loc="lower right")
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
    """Counts as a heat map: rows true, columns answered, the last column answers that are no class name."""
    columns = [*names, "other"]
    shown = len(names) <= 40
    side = max(4.5, 0.32 * len(names)) if shown else 10
    figure, axis = plt.subplots(figsize=(side + 0.8, side), layout="constrained")
    shares = [[count / max(1, sum(row)) for count in row] for row in table]
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set(xlabel="answered", ylabel="true", title=title)
    axis.title.set_fontsize(10)
    if shown:
        axis.set_xticks(range(len(columns)), columns, rotation=90)
        axis.set_yticks(range(len(names)), names)
        for y, row in enumerate(table):
            for x, count in enumerate(row):
                if count:
                    axis.text(
                        x,
                        y,
                        str(count),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if shares[y][x] > 0.5 else "black",
                    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
