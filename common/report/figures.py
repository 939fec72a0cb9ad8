"""Draw the figures of a run (learning curves, confusion matrices, calibration); style of all figures. No torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import cycle
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator

from common.counted import counted
from common.evaluation.evaluate import Evaluation
from common.evaluation.metrics import Summary, calibration_error, reliability, selective_risks
from common.evaluation.metrics import confusion as confusion_counts
from common.run.result import Result
from common.run.run_folder import RunFolder, best_effort
from common.types import Task

# Figures of one run.
matplotlib.use("Agg")

COLOURS = ("#2f6db3", "#d9822b", "#5a9e5a", "#9467bd")
GREY = "#8a8a8a"
LITERAL: Any = {"text.parse_math": False, "text.usetex": False}  # a $ in a user's class name is not a formula
literal_text = matplotlib.rc_context(LITERAL)  # decorator for functions that draw names
LEGIBLE = 40  # most classes of a matrix with names and counts
PAIRS = 25  # number of confusions shown if there are more classes
WIDEST = 28  # characters of a name beside a figure


def of_run(folder: Path, result: Result, evaluation: Evaluation, task: Task) -> None:
    """Draw curves.png (accuracies where there is no curve) and confusions. A figure that fails only logs a warning.

    Args:
        folder: Run folder.
        result: Result of the run.
        evaluation: Last evaluation of the run.
        task: Task with the class names.
    """
    title = f"{result.method}, {result.data}, {result.setting}, {counted(result.shots, 'shot')}, seed {result.seed}"
    title += f"\n{result.model}, {result.protocol}, {', '.join(dict.fromkeys(result.origins.values()))}"
    rows = RunFolder(folder).read_log("metrics.jsonl")
    drawings: dict[str, Callable[[], Figure]] = {
        "curves.png": partial(curves, rows) if has_curves(rows) else partial(accuracies, result.final)
    }
    titles = {"curves.png": title}
    for split in (split for split in evaluation.summary if split != "val"):
        summary, names = evaluation.summary[split], task.evaluation[split].choices
        note = f"{title}\n{split} accuracy {100 * summary.accuracy:.1f} % of {summary.n}"
        table = confusion_counts(evaluation.answers[split].predictions, names)
        drawings[f"confusion-{split}.png"] = partial(confusion, table, names)
        titles[f"confusion-{split}.png"] = note
    for name, draw in drawings.items():
        with best_effort(name):
            save(draw(), folder / name, titles[name])


@literal_text
def save(figure: Figure, path: Path, title: str) -> None:
    """Save a figure with a title as PNG and SVG."""
    figure.suptitle(drawable(title), fontsize=9)
    figure.set_dpi(130)
    if (layout := figure.get_layout_engine()) is not None:  # compute the layout once for both files
        layout.execute(figure)
        figure.set_layout_engine("none")
    figure.savefig(path)
    figure.savefig(path.with_suffix(".svg"))
    plt.close(figure)


@literal_text
def accuracies(summaries: Mapping[str, Summary]) -> Figure:
    """Draw the accuracy of every split with its 95 % interval, for a run without training."""
    figure, axis = plt.subplots(figsize=(7, 1.6 + 0.4 * len(summaries)), layout="constrained")
    rows = list(summaries.values())
    shares = [100 * summary.accuracy for summary in rows]
    below = [share - 100 * summary.ci95[0] for summary, share in zip(rows, shares, strict=True)]
    above = [100 * summary.ci95[1] - share for summary, share in zip(rows, shares, strict=True)]
    bars = axis.barh(list(summaries), shares, color=COLOURS[0], height=0.6)
    axis.errorbar(shares, range(len(rows)), xerr=(below, above), fmt="none", ecolor=GREY, capsize=3)
    axis.bar_label(bars, [f"{share:.1f} %" for share in shares], label_type="center", color="white")
    axis.set(xlabel="accuracy (%) with its 95 % interval", xlim=(0, 100))
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def has_curves(metrics: Sequence[dict[str, Any]]) -> bool:
    """Return whether anything was measured more than once; `metrics` as in `curves`."""
    measured = {row["step"] for row in metrics if any(key == "loss" or key.startswith("eval/") for key in row)}
    return len(measured) > 1


@literal_text
def curves(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Draw reward (or loss) and completion length over updates, and every measured accuracy.

    A learner that is fitted in one step has neither rewards nor losses: only accuracies are drawn.

    `metrics`: lines of metrics.jsonl.
    """
    # left: rewards or loss
    rows = [row for row in metrics if "loss" in row]
    figure, axes = plt.subplots(
        1, 2 if rows else 1, figsize=(10 if rows else 5, 3.6), squeeze=False, layout="constrained"
    )
    left, right = axes[0, 0], axes[0, -1]
    rewards = sorted({key for row in rows for key in row if key.startswith("rewards/") and key.endswith("/mean")})
    for name, colour in zip(rewards or ["loss"] * bool(rows), cycle(COLOURS), strict=False):
        # later updates on the same rollout batch have no rewards of their own
        steps, values = zip(*[(row["step"], row[name]) for row in rows if name in row], strict=True)
        left.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        label = name.removeprefix("rewards/").removesuffix("/mean")
        left.plot(steps, smooth(values), color=colour, linewidth=2, label=label)
    left.set(xlabel="update", ylabel="mean reward" if rewards else "loss (nats)")
    # right: accuracies, and completion length on a second axis
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
    for axis in axes[0]:
        axis.grid(alpha=0.25)
        axis.spines[["top"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, loc="lower right")
    return figure


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Compute an exponential moving average without the bias of its start.

    >>> smooth([1.0, 1.0])
    [1.0, 1.0]
    """
    out, mean = [], 0.0
    for count, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**count))
    return out


@literal_text
def confusion(table: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    """Draw which classes are confused: all counts if there are few classes, else the most frequent confusions.

    Args:
        table: Counts of [true class][answered class]; the last column counts answers that are not a class name.
        names: Class names.
    """
    names = [shortened(drawable(name)) for name in names]
    return _matrix(table, names) if len(names) <= LEGIBLE else _pairs(table, names)


def drawable(name: str) -> str:
    """Return a name in characters of the font; others are spelt out, so that different names stay different.

    >>> drawable("\U0001f389 jeans"), drawable("na\u00efve"), drawable("\u732b")
    ('(party popper) jeans', 'naïve', '(U+732B)')
    """
    return "".join(letter if ord(letter) in _letters() else _spelt_out(letter) for letter in name)


def _spelt_out(letter: str) -> str:
    kind = unicodedata.category(letter)
    if kind in ("Mn", "Cf", "Cc"):  # combining marks and invisible characters
        return ""
    called = unicodedata.name(letter, "").lower()
    return f"({called})" if kind.startswith("S") and called else f"(U+{ord(letter):04X})"


@cache
def _letters() -> frozenset[int]:
    """Return the code points of Matplotlib's default font, and the line break."""
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap()) | {ord("\n")}


def shortened(name: str) -> str:
    """Shorten a name to fit beside a figure, keeping both ends.

    >>> shortened("jogging shoes with a very long name, red")
    'jogging shoes with…name, red'
    """
    return name if len(name) <= WIDEST else f"{name[: WIDEST - 10].rstrip()}…{name[-9:].lstrip()}"


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
    pairs = sorted(wrong, key=lambda each: (-each[0], each[1:]))[:PAIRS]
    figure, axis = plt.subplots(figsize=(9, 1.6 + 0.24 * max(1, len(pairs))), layout="constrained")
    rows = range(len(pairs))
    axis.barh(rows, [count for count, *_ in pairs], color=COLOURS[0])
    axis.set_yticks(rows, [f"{names[y]} → {columns[x]}" for _, y, x in pairs], fontsize=8)
    for row, (count, y, _) in enumerate(pairs):
        axis.text(count, row, f" {count} of {sum(table[y])}", va="center", fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel=f"images; the {len(pairs)} most frequent confusions, true → answered")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.12)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@literal_text
def calibration(splits: Mapping[str, tuple[Sequence[float], Sequence[bool]]]) -> Figure:
    """Draw reliability (accuracy against probability of the most probable name) and selective risk.

    The legend has how far confidences are off on average (expected calibration error), and the mean of the share of
    wrong answers over all coverages (area under the risk-coverage curve).

    Args:
        splits: For each split, the probability of every image's most probable name, and whether it is right. [N], [N].
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    left.plot([0, 100], [0, 100], color=GREY, linewidth=1, linestyle=":")
    for number, (name, (confidences, correct)) in enumerate(splits.items()):
        look = style(number)
        line = {"color": look["color"], "linestyle": look["linestyle"], "linewidth": 1.2}
        bins, risks = reliability(confidences, correct), selective_risks(confidences, correct)
        x, y = [100 * mean for mean, _, _ in bins], [100 * accuracy for _, accuracy, _ in bins]
        error, area = calibration_error(confidences, correct), fmean(risks)
        left.plot(x, y, **line, label=f"{name}: off by {100 * error:.1f} % (ECE), risk {100 * area:.1f} % (AURC)")
        areas = [12 + 160 * count / len(confidences) for *_, count in bins]
        left.scatter(x, y, areas, color=look["color"], marker=look["marker"], alpha=0.8)
        coverage = [100 * (place + 1) / len(risks) for place in range(len(risks))]
        step = max(1, len(risks) // 500)  # 500 points are enough for a line
        right.plot(coverage[::step], [100 * risk for risk in risks[::step]], **line)
    left.set(xlabel="probability of the most probable name (%)", ylabel="right (%)", xlim=(0, 100), ylim=(0, 100))
    right.set(xlabel="images answered, the surest first (%)", ylabel="wrong among them (%)", xlim=(0, 100))
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(2, len(splits)), frameon=False)
    return figure


# Style of figures for papers: Okabe and Ito's colours, which colour-blind readers can tell apart.

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A8A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
LINES = ("-", "--", "-.", ":")
SIGN, LETTER = 0.5, 0.074  # width of a line sample and of a letter in a legend, in inches
WIDTH = 3.4  # inches of a panel: a column of a paper
PRINT: Any = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def save_picture(figure: Figure, stem: Path) -> None:
    """Save a figure as PNG for slides, SVG for pages, PDF for papers."""
    figure.savefig(f"{stem}.png", dpi=300)  # not with_suffix: a name may contain dots
    for ending in (".svg", ".pdf"):
        options: Any = {"metadata": {"Date": None}, "transparent": True} if ending == ".svg" else {}
        figure.savefig(f"{stem}{ending}", **options)
    plt.close(figure)


def style(number: int) -> dict[str, Any]:
    """Return colour, marker and line style of the series with this number."""
    return {
        "color": OKABE_ITO[number % len(OKABE_ITO)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[(number // len(OKABE_ITO)) % len(LINES)] if number >= len(OKABE_ITO) else LINES[number % 2],
    }


def panels(count: int, height: float, width: float = WIDTH, columns: int = 4) -> tuple[Figure, list[Axes]]:
    """Create a figure with `count` axes, each `width` x `height` inches, at most `columns` in a row."""
    wide = max(1, min(columns, count))
    tall = max(1, ceil(count / wide))
    figure, axes = plt.subplots(tall, wide, figsize=(width * wide, height * tall), layout="constrained", squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def note(axis: Axes, text: str) -> None:
    """Write the name of a panel above its axes."""
    if text:
        axis.annotate(text, (0.02, 1.01), xycoords="axes fraction", fontsize=8, va="bottom", weight="bold")


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Draw one legend for all axes, below them."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    width = figure.get_figwidth()
    most = int((width - SIGN) / LETTER)
    names = [label if len(label) <= most else f"{label[: most - 1]}…" for label in found]
    if found:
        wide = max(1, int(width / (SIGN + LETTER * max(map(len, names)))))
        columns = min(len(found), wide)
        figure.legend(found.values(), names, loc="outside lower center", ncols=columns, frameon=False)
