"""Find what may be wrong with the training images: labels, outliers, copies, classes that are not told apart.

Labels are doubted where learners that had not seen an image say otherwise (cleanlab's confident learning, Northcutt et
al. 2021, arXiv 1911.00068), outliers are found by the features of the encoder, copies by small grey thumbnails.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.data.duplicates import CORRELATION
from common.types import UserError

FILE = "doubts.csv"

NEIGHBOURS, DIMENSIONS = 10, 64  # of the local outlier factor
OUTLYING = 1.2  # local outlier factor from which on a photo is unlike the others
FEW = 5  # wrong answers from which on two classes are said to be taken for one another


@dataclass(frozen=True)
class LabelDoubts:
    """quality: how well a label fits, from 0 to 1; issue: it is probably wrong. Shape of both: [N]."""

    quality: NDArray[np.float64]
    issue: NDArray[np.bool_]


def labels(given: NDArray[np.int64], probabilities: NDArray[np.float64]) -> LabelDoubts:
    """Judge labels by cleanlab.

    Args:
        given: Labels. Shape: [N].
        probabilities: Probabilities of the classes by learners that had not seen the image. Shape: [N, C].

    Raises:
        UserError: cleanlab is not installed.
    """
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError as error:
        raise UserError("doubtful labels need cleanlab: uv pip install 'cleanlab>=2.9,<3'") from error
    quality = get_label_quality_scores(given, probabilities)
    # on garments with 5 % swapped labels this finds 94 %, cleanlab's default 81 %, at a higher precision (docs/log.md)
    issue = find_label_issues(given, probabilities, filter_by="low_self_confidence", n_jobs=1)
    return LabelDoubts(np.asarray(quality, np.float64), np.asarray(issue, bool))


def outlyingness(features: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the local outlier factor of every image (Breunig et al. 2000): about 1 among others, higher apart.

    Of the first principal components of the features. Shape: [N, D] -> [N].
    """
    from sklearn.decomposition import PCA
    from sklearn.neighbors import LocalOutlierFactor

    if len(features) < 3:
        return np.ones(len(features))
    count = min(DIMENSIONS, *features.shape)
    rows = PCA(count, random_state=0).fit_transform(features.astype(np.float64))
    found = LocalOutlierFactor(min(NEIGHBOURS, len(rows) - 1)).fit(rows)
    return -np.asarray(found.negative_outlier_factor_, np.float64)


def copies(thumbnails: NDArray[np.floating], least: float = CORRELATION) -> list[tuple[int, int, float]]:
    """Return pairs of images whose thumbnails have a correlation of `least` or more, the most similar first."""
    similar = np.triu(thumbnails @ thumbnails.T, 1)
    found = [(int(a), int(b), float(similar[a, b])) for a, b in zip(*np.nonzero(similar >= least), strict=True)]
    return sorted(found, key=lambda pair: -pair[2])


def confused(given: NDArray[np.int64], probabilities: NDArray[np.float64]) -> list[tuple[int, int, int]]:
    """Return pairs of classes that are taken for one another, with the number of images; the most frequent first."""
    answers = probabilities.argmax(1)
    count = probabilities.shape[1]
    table = np.zeros((count, count), int)
    np.add.at(table, (given, answers), 1)
    both = np.triu(table + table.T, 1)
    found = [(int(a), int(b), int(both[a, b])) for a, b in zip(*np.nonzero(both >= FEW), strict=True)]
    return sorted(found, key=lambda pair: -pair[2])


@dataclass(frozen=True)
class Doubt:
    """A row of doubts.csv, which may be corrected and given back (`data.reader.corrections`).

    path: photo in the dataset's folder.
    label: its class, to be corrected; empty: the photo is left out.
    suggestion: the class that it is taken for.
    reason: `label` (probably wrong, by cleanlab), `disagreement` (taken for another class), `outlier`, `copy` or
        `copy, other label`.
    score: how well the label fits (0: not at all), the local outlier factor, or the correlation of the copies.
    other: the photo that it is a copy of.
    part: train or test.
    """

    path: str
    label: str
    suggestion: str
    reason: str
    score: float
    other: str
    part: str


@dataclass(frozen=True)
class Examined:
    """Photos with what is known of them.

    paths: in the dataset's folder.
    parts: train or test.
    given: labels. Shape: [N].
    probabilities: of the classes, by learners that had not seen the image; NaN where there are none. Shape: [N, C].
    features: of the encoder. Shape: [N, D].
    thumbnails: see `duplicates.thumbnail`. Shape: [N, THUMBNAIL * THUMBNAIL].
    """

    paths: Sequence[str]
    parts: Sequence[str]
    given: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    features: NDArray[np.floating]
    thumbnails: NDArray[np.floating]


def find(photos: Examined, names: Sequence[str]) -> list[Doubt]:
    """Return all doubts: probably wrong labels and other disagreements, the worst first, then outliers, then copies.

    Copies are named where they cross the parts or have other labels.
    """
    known = np.flatnonzero(~np.isnan(photos.probabilities).any(1))
    judged = labels(photos.given[known], photos.probabilities[known])
    answers = {int(place): int(row.argmax()) for place, row in zip(known, photos.probabilities[known], strict=True)}

    def doubt(place: int, reason: str, score: float, other: str = "") -> Doubt:
        answered = answers.get(place)
        suggestion = "" if answered is None or answered == photos.given[place] else names[answered]
        label = names[photos.given[place]]
        return Doubt(photos.paths[place], label, suggestion, reason, round(score, 4), other, photos.parts[place])

    worst = judged.quality.argsort(kind="stable").tolist()
    wrong = [n for n in worst if judged.issue[n]]
    others = [n for n in worst if not judged.issue[n] and answers[int(known[n])] != photos.given[known[n]]]
    found = [
        doubt(int(known[number]), reason, float(judged.quality[number]))
        for reason, numbers in (("label", wrong), ("disagreement", others))
        for number in numbers
    ]
    apart = outlyingness(photos.features)
    found += [doubt(int(n), "outlier", float(apart[n])) for n in (-apart).argsort(kind="stable") if apart[n] > OUTLYING]
    for one, other, score in copies(photos.thumbnails):
        if photos.given[one] != photos.given[other]:
            found.append(doubt(one, "copy, other label", score, photos.paths[other]))
        elif photos.parts[one] != photos.parts[other]:
            found.append(doubt(one, "copy", score, photos.paths[other]))
    return found


def write(found: Sequence[Doubt], path: Path) -> None:
    """Write the doubts as a CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(Doubt)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, found))


def read(path: Path) -> list[Doubt]:
    """Read what `write` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Doubt(**{**row, "score": float(row["score"])}) for row in csv.DictReader(file)]  # type: ignore[arg-type]
