"""Tell photos of the known classes from others, by the features of an encoder.

The score of a photo is its relative Mahalanobis distance (Ren et al. 2021, arXiv 2106.09022): the distance to the
nearest class mean, in the covariance within the classes, less the distance to the mean of all photos, in the covariance
of all. On leave-one-class-out garments it was ahead of nearest neighbours, the plain distance and the classifier's own
confidence (docs/log.md).

A score is then compared with those of the training photos, each by a detector that has not seen it. The share of these
that look at least as unusual is the p-value of conformal prediction (Vovk et al. 2005): among new photos of the known
classes, about 5 % have a p-value of at most 0.05. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

FILE = "novelty.npz"
DIMENSIONS = 64  # principal components of the features, at most a third as many as photos
SHARE = 0.05  # of the known photos that `measure` lets be called unknown
CLASSES, PHOTOS = 20, 3000  # that `measure` leaves out in turn and looks at, at most


@dataclass(frozen=True)
class Detector:
    """A fitted detector. Features have D dimensions, principal components P.

    mean, components: of the principal component analysis. Shapes: [D], [P, D].
    classes: class means. Shape: [C, P].
    within, overall: inverse covariances within the classes and of all photos. Shape: [P, P].
    known: scores of the training photos by detectors that have not seen them, ascending. Shape: [N]; empty before
        `calibrated`.
    """

    mean: Floats
    components: Floats
    classes: Floats
    within: Floats
    overall: Floats
    known: Floats

    def scores(self, features: Floats) -> Floats:
        """Return the score of each photo, higher for unusual ones. Shape: [N, D] -> [N]."""
        rows = (features - self.mean) @ self.components.T
        to_classes = np.stack([_distances(rows - centre, self.within) for centre in self.classes])
        return np.asarray(to_classes.min(0) - _distances(rows, self.overall))

    def p_values(self, features: Floats) -> Floats:
        """Return the share of training photos that look at least as unusual, counting the photo itself. Shape: [N]."""
        below = np.searchsorted(self.known, self.scores(features), side="left")
        return np.asarray((len(self.known) - below + 1) / (len(self.known) + 1))

    def save(self, folder: Path) -> None:
        """Write it into a folder."""
        np.savez(folder / FILE, **asdict(self))  # type: ignore[arg-type]

    @classmethod
    def load(cls, folder: Path) -> Detector | None:
        """Read what `save` wrote; None if the folder has none."""
        if not (folder / FILE).is_file():
            return None
        with np.load(folder / FILE, allow_pickle=False) as arrays:
            return cls(**{each.name: arrays[each.name] for each in fields(cls)})


def _distances(rows: Floats, precision: Floats) -> Floats:
    return np.asarray(np.einsum("ij,jk,ik->i", rows, precision, rows))


def fit(features: Floats, labels: NDArray[np.integer]) -> Detector:
    """Fit a detector, without `known`. Shapes: [N, D], [N].

    The covariance within the classes is shrunk (Ledoit and Wolf 2004); that of all photos is its sum with the one of
    the class means. Shrunk by itself it would differ where the classes do not, and hide what lies far off there.
    """
    from sklearn.covariance import ledoit_wolf
    from sklearn.decomposition import PCA

    count = max(1, min(DIMENSIONS, len(features) // 3, features.shape[1]))
    reduced = PCA(count, random_state=0).fit(features.astype(np.float64))
    rows = reduced.transform(features)
    there, place = np.unique(labels, return_inverse=True)
    centres = np.stack([rows[place == number].mean(0) for number in range(len(there))])
    within = ledoit_wolf(rows - centres[place], assume_centered=True)[0]
    overall = within + rows.T @ centres[place] / len(rows)  # each class mean counts as often as it has photos
    inverses = (np.linalg.pinv(each) for each in (within, overall))
    values = (reduced.mean_, reduced.components_, centres, *inverses, np.empty(0))
    return Detector(*(value.astype(np.float32) for value in values))


def calibrated(features: Floats, labels: NDArray[np.integer], parts: Sequence[int]) -> Detector:
    """Fit a detector on all photos, and `known` by cross-validation.

    Args:
        features: Features. Shape: [N, D].
        labels: Class indices. Shape: [N].
        parts: Part of each photo, -1 for one that is always fitted on. Length: N.
    """
    where, scores = np.asarray(parts), np.full(len(labels), np.nan)
    for part in sorted({*parts} - {-1}):
        tested = where == part
        scores[tested] = fit(features[~tested], labels[~tested]).scores(features[tested])
    known = np.sort(scores[~np.isnan(scores)]).astype(np.float32)
    return replace(fit(features, labels), known=known)


def measure(
    features: Floats,
    labels: NDArray[np.integer],
    names: Sequence[str],
    parts: Callable[[NDArray[np.integer]], Sequence[int]],
) -> dict[str, Any]:
    """Measure how well photos of unknown classes are told apart, by leaving out one class after the other.

    Args:
        features: Features. Shape: [N, D].
        labels: Class indices. Shape: [N].
        names: Class names. Length: C.
        parts: Function from labels to the part of each photo, for `calibrated`.

    Returns:
        `share`: share of the known photos that may be called unknown. `found`: for each class that was left out, the
        share of its photos that are called unknown. Of many classes CLASSES are left out, of many photos PHOTOS looked
        at, evenly spaced. Empty with fewer than three classes, or too few photos to call one unknown.
    """
    if len(labels) > PHOTOS:
        kept = np.linspace(0, len(labels) - 1, PHOTOS).astype(int)
        features, labels = features[kept], labels[kept]
    there = np.unique(labels)
    chosen = there[np.linspace(0, len(there) - 1, min(CLASSES, len(there))).round().astype(int)]
    found: dict[str, float] = {}
    for label in chosen.tolist() if len(there) > 2 else []:
        out = labels == label
        detector = calibrated(features[~out], labels[~out], parts(labels[~out]))
        if len(detector.known) < smallest(SHARE):
            return {}
        found[names[label]] = float((detector.p_values(features[out]) <= SHARE).mean())
    return {"share": SHARE, "found": found} if found else {}


def smallest(share: float) -> int:
    """Return the number of cross-validated photos from which on any p-value can be at most `share`.

    >>> smallest(0.05), smallest(0.1)  # 1 / (19 + 1), 1 / (9 + 1)
    (19, 9)
    """
    return int(np.ceil(1 / share - 1 - 1e-9))


def line(measured: Mapping[str, Any]) -> str:
    """Return a line with the result of `measure`; empty without one."""
    if not measured:
        return ""
    found: Mapping[str, float] = measured["found"]
    worst = min(found, key=lambda name: found[name])
    return (
        f"unknown classes: --unknown {measured['share']:g} would notice"
        f" {100 * np.mean(list(found.values())):.0f} % of the photos of a class that it has not seen (least {worst}:"
        f" {100 * found[worst]:.0f} %), and call about {100 * measured['share']:.0f} % of the known ones unknown"
    )
