"""A run's pictures for papers and slides, from its folder alone: no title, PNG with 300 dpi, SVG and PDF."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from common.parsing import normalize
from common.report import figures
from common.report.html.transcripts import class_names, surest, tests
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
    if splits := surest(folder):
        drawings["calibration"] = partial(figures.calibration, splits)
    for split, (table, names) in confusions(folder).items():
        drawings[f"confusion-{split}"] = partial(figures.confusion, table, names)
    (folder / FOLDER).mkdir(exist_ok=True)
    with matplotlib.rc_context(PRINT):
        for name, draw in drawings.items():
            save(draw(), folder / FOLDER / name)
    return [folder / FOLDER / f"{name}.png" for name in drawings]


def confusions(folder: Path) -> dict[str, tuple[list[list[int]], list[str]]]:
    """Of every split but val at the end of a run: counts of [true class][answered class, last none], and the names."""
    known = class_names(folder)
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for row in tests(folder, {}):
        if row.split != "val":
            answers = counts.setdefault(row.split, {}).setdefault(normalize(row.label), {})
            answer = normalize(row.answer or "")
            answers[answer] = answers.get(answer, 0) + 1
    found = {}
    for split, by_label in counts.items():
        labels = [name for name in known if name in by_label or any(name in answers for answers in by_label.values())]
        table = []
        for label in labels:
            answers = by_label.get(label, {})
            said = [answers.get(answer, 0) for answer in labels]
            table.append([*said, sum(answers.values()) - sum(said)])
        found[split] = table, [known[label] for label in labels]
    return found
