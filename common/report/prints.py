"""Draw a run's figures for papers and slides from its folder: no title, PNG with 300 dpi, SVG and PDF."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from common.report.figures import PRINT, accuracies, calibration, confusion, curves, has_curves, save_picture
from common.report.html.transcripts import class_names, tally
from common.run.result import Result
from common.run.run_folder import RunFolder

FOLDER = "figures"


def write_prints(folder: Path) -> list[Path]:
    """Draw curves (or accuracies), calibration and a confusion matrix per test into figures/; return the PNG paths.

    Raises:
        UserError: The folder holds no finished run.
    """
    result = Result.load(folder)
    drawings: dict[str, Callable[[], Figure]] = {"accuracies": partial(accuracies, result.final)}
    if has_curves(rows := RunFolder(folder).read_log("metrics.jsonl")):
        drawings["curves"] = partial(curves, rows)
    counted, names = tally(folder), class_names(folder)
    if counted.surest:
        drawings["calibration"] = partial(calibration, counted.surest)
    for split in (split for split in counted.pairs if split != "val"):
        drawings[f"confusion-{split}"] = partial(confusion, *confusion_print(counted.pairs[split], names))
    (folder / FOLDER).mkdir(exist_ok=True)
    with matplotlib.rc_context(PRINT):
        for name, draw in drawings.items():
            save_picture(draw(), folder / FOLDER / name)
    return [folder / FOLDER / f"{name}.png" for name in drawings]


def confusion_print(
    pairs: Mapping[tuple[str, str], int], names: Mapping[str, str]
) -> tuple[list[list[int]], list[str]]:
    """Return counts of [true class][answered class, last: none of them], and the names of the classes that occur.

    Args:
        pairs: Number of images for each pair of label and answer, both normalised.
        names: Class names as they are written, by normalised name.
    """
    there = {name for pair in pairs for name in pair}
    labels = [name for name in names if name in there]
    places = {name: number for number, name in enumerate(labels)}
    table = [[0] * (len(labels) + 1) for _ in labels]
    for (label, answer), count in pairs.items():
        table[places[label]][places.get(answer, len(labels))] += count
    return table, [names[name] for name in labels]
