"""A run's pictures for papers and slides, from its folder alone: no title, PNG with 300 dpi, SVG and PDF."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from common.report import figures
from common.report.html.transcripts import class_names, tally
from common.report.paper.style import PRINT, save
from common.run.result import Result
from common.run.run_folder import RunFolder

FOLDER = "figures"


def write(folder: Path) -> list[Path]:
    """Draw curves (or accuracies), calibration, and a confusion matrix per test into figures/; the PNGs' paths.

    Raises:
        UserError: The folder holds no finished run.
    """
    result = Result.load(folder)
    drawings: dict[str, Callable[[], Figure]] = {"accuracies": partial(figures.accuracies, result.final)}
    if result.after:
        drawings["curves"] = partial(figures.curves, RunFolder(folder).read_log("metrics.jsonl"))
    counted, names = tally(folder), class_names(folder)
    if counted.surest:
        drawings["calibration"] = partial(figures.calibration, counted.surest)
    for split in (split for split in counted.pairs if split != "val"):
        drawings[f"confusion-{split}"] = partial(figures.confusion, *confusion(counted.pairs[split], names))
    (folder / FOLDER).mkdir(exist_ok=True)
    with matplotlib.rc_context(PRINT):
        for name, draw in drawings.items():
            save(draw(), folder / FOLDER / name)
    return [folder / FOLDER / f"{name}.png" for name in drawings]


def confusion(pairs: Mapping[tuple[str, str], int], names: Mapping[str, str]) -> tuple[list[list[int]], list[str]]:
    """Counts of [true class][answered class, last: none of them], and the names of the classes that occur.

    Args:
        pairs: How often a label was answered in which way.
        names: As they are written, by what answers are compared with.
    """
    there = {name for pair in pairs for name in pair}
    labels = [name for name in names if name in there]
    places = {name: number for number, name in enumerate(labels)}
    table = [[0] * (len(labels) + 1) for _ in labels]
    for (label, answer), count in pairs.items():
        table[places[label]][places.get(answer, len(labels))] += count
    return table, [names[name] for name in labels]
