"""How a page's pictures look. Colours are Okabe and Ito's, which colour-blind readers tell apart; every series also has
a marker and a line style of its own, so that a grey print can be read. No title: the caption says what it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells every step of a PDF

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A8A")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
LINES = ("-", "--", "-.", ":")
SIGN, LETTER = 0.5, 0.074  # inches in a legend
WIDTH = 3.4  # inches of a panel: a column of a paper
PRINT: Any = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def save(figure: Figure, stem: Path) -> None:
    """As PNG for slides, SVG for pages, PDF for papers."""
    figure.savefig(f"{stem}.png", dpi=300)  # a name may have dots
    for ending in (".svg", ".pdf"):
        options: Any = {"metadata": {"Date": None}, "transparent": True} if ending == ".svg" else {}
        figure.savefig(f"{stem}{ending}", **options)
    plt.close(figure)


def style(number: int) -> dict[str, Any]:
    """Of the series with this number."""
    return {
        "color": OKABE_ITO[number % len(OKABE_ITO)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[(number // len(OKABE_ITO)) % len(LINES)] if number >= len(OKABE_ITO) else LINES[number % 2],
    }


def panels(count: int, height: float, width: float = WIDTH, columns: int = 4) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes, each `width` x `height` inches, `columns` beside one another."""
    wide = max(1, min(columns, count))
    tall = max(1, ceil(count / wide))
    figure, axes = plt.subplots(tall, wide, figsize=(width * wide, height * tall), layout="constrained", squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def note(axis: Axes, text: str) -> None:
    """Which panel it is, inside it."""
    if text:
        axis.annotate(text, (0.02, 1.01), xycoords="axes fraction", fontsize=8, va="bottom", weight="bold")


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One for all axes, below them."""
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
