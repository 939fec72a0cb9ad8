"""Write doubts.html of a run: the photos that may be wrong, worst first (common/few_shot/doubts.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.evaluation import metrics
from common.few_shot import doubts
from common.few_shot.doubts import Doubt
from common.report import folders
from common.report.compare import Table
from common.report.html.render import render, write
from common.report.html.transcripts import picture
from common.run import predictions
from common.run.run_folder import RunFolder

FILE = "doubts.html"
TITLES = {
    "label": ("labels", "Labels that are probably wrong"),
    "disagreement": ("disagreements", "Taken for another class"),
    "outlier": ("outliers", "Unlike all others"),
    "copy": ("copies", "In training and test"),
    "copy, other label": ("disagreeing", "Nearly the same picture, two labels"),
}


def make(folder: Path) -> Path | None:
    """Write the page into the folder of a run that has doubts.csv, and return its path; None for another run."""
    if not (folder / doubts.FILE).is_file():
        return None
    found = doubts.read(folder / doubts.FILE)
    thumbnails = {key.partition("/")[2]: image for key, image in predictions.read_thumbnails(folder).items()}
    groups = [
        (mark, title, [_card(each, thumbnails) for each in found if each.reason == reason])
        for reason, (mark, title) in TITLES.items()
    ]
    groups = [group for group in groups if group[2]]
    confused = _confused(folder)
    parts = [(mark, title) for mark, title, _ in groups]
    page = render(
        "doubts.html",
        "",
        title=f"What may be wrong with {folders.photos(folders.read_run(folder).values)}",
        subtitle=f"{summary(found)}; {folder.resolve().name}",
        parts=[*parts, ("confused", "Classes that are taken for one another")] if confused.rows else parts,
        groups=groups,
        confused=confused,
        table=doubts.FILE,
    )
    write(folder / FILE, page)
    return folder / FILE


def summary(found: Sequence[Doubt]) -> str:
    """Return how many photos there are of each kind of doubt."""
    words = {
        "label": "label that is probably wrong",
        "disagreement": "photo taken for another class",
        "outlier": "outlier",
        "copy": "copy",
        "copy, other label": "copy with another label",
    }
    counts = {word: sum(each.reason == reason for each in found) for reason, word in words.items()}
    return ", ".join(f"{count} x {word}" for word, count in counts.items() if count) or "nothing"


def _card(doubt: Doubt, thumbnails: dict[str, bytes]) -> dict[str, Any]:
    return {
        "doubt": doubt,
        "picture": picture(thumbnails, doubt.path),
        "other": picture(thumbnails, doubt.other) if doubt.other else None,
    }


def _confused(folder: Path) -> Table:
    """Return the pairs of classes that held-out learners take for one another."""
    held_out = RunFolder(folder).read_held_out()
    if held_out is None or held_out.probabilities is None:
        return Table((), [], [])
    table = held_out.probabilities
    truths = metrics.truth_places(table, [p.label for p in held_out.predictions])
    pairs = doubts.confused(truths, table.values.astype(np.float64))
    sizes = np.bincount(truths, minlength=len(table.names))
    rows = [
        (f"{table.names[a]} – {table.names[b]}", str(count), f"{100 * count / (sizes[a] + sizes[b]):.0f} %")
        for a, b, count in pairs
    ]
    return Table(("classes", "photos", "of both"), rows, [])
