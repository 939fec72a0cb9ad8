"""The categories that a test prompt offers: the top-k of a draft, any few-shot learner (ALERT section 3.1). No torch.

Drafts: `class_means` (the nearest class mean, from the run's own features), `oracle_recall` (always contains the truth;
an upper bound, not a method), and files that other learners wrote (alert/draft/candidate_file.py).

Shapes: N images, C classes, k candidates per image, K >= k that are kept, D features.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alert.draft.references import name_groups
from common.config.checks import one_of
from common.types import UserError

DEPTH = 16  # categories that are kept of a draft's ranking; the paper shows up to 8 (Table 5)
CHUNK = 4096  # images that are sorted together, which bounds the memory
ORDERS = ("rank", "shuffle")


@dataclass(frozen=True)
class Origin:
    """Whose ranking it is. `uses_labels`: the truth was put in, so what comes of it is an upper bound."""

    method: str
    dataset: str
    shots: int | str
    seed: int
    uses_labels: bool = False


@dataclass(frozen=True)
class Candidates:
    """The best categories of every image.

    Args:
        images: Keys, each once. Length: N.
        indices: Classes, best first, no name twice. Shape: [N, K].
        logits: Of these classes, not increasing along a row. Shape: [N, K].
        origin: Whose ranking it is.

    Raises:
        ValueError: Shapes do not fit, or an image occurs twice.
    """

    images: tuple[str, ...]
    indices: NDArray[np.int64]
    logits: NDArray[np.float64]
    origin: Origin

    def __post_init__(self) -> None:
        if self.indices.shape != self.logits.shape or self.indices.shape[:-1] != (len(self.images),):
            raise ValueError(
                f"{len(self.images)} images, indices of shape {self.indices.shape}, logits of shape {self.logits.shape}"
            )
        if len(self._row) != len(self.images):
            raise ValueError("an image occurs twice")

    @cached_property
    def _row(self) -> dict[str, int]:
        return {image: row for row, image in enumerate(self.images)}

    def ranking(self, image: str) -> tuple[int, ...]:
        """All classes that are kept of an image, best first. Length: K."""
        return tuple(self.indices[self._row[image]].tolist())

    def shown(self, image: str, k: int, order: str = "rank") -> tuple[int, ...]:
        """The k best classes of an image, as the prompt lists them. The paper does not say in which order: our choice.

        Args:
            image: Its key.
            k: How many; the paper's default is 2.
            order: `rank` (best first, which tells the model what the draft prefers) or `shuffle` (a random order that
                depends on the image alone).

        Raises:
            UserError: `k` or `order` cannot be met.
        """
        one_of("method.order", order, ORDERS)
        _check_k(k, self.indices.shape[1], "are kept of each image")
        best = list(self.ranking(image)[:k])
        if order == "shuffle":
            random.Random(f"candidates-{image}").shuffle(best)
        return tuple(best)


def select(logits: ArrayLike, k: int, names: Sequence[str] | None = None) -> NDArray[np.int64]:
    """The k classes of the highest logits, best first; equal ones by class index (section 3.1). Knows no labels.

    Of classes that share a name only the best one counts, since a list must not offer a name twice.

    Args:
        logits: One number per class; higher is more likely. Shape: [N, C].
        k: How many classes.
        names: Of the classes, as they are shown. Length: C. None: no two share one.

    Returns:
        Class indices. Shape: [N, k].

    Raises:
        UserError: There are fewer than k names.
        ValueError: The logits do not fit the names, or one is not a number.

    >>> select([[0.1, 0.7, 0.7], [0.5, 0.2, 0.3]], k=2).tolist()
    [[1, 2], [0, 2]]
    >>> select([[0.1, 0.7, 0.7], [0.5, 0.2, 0.3]], k=2, names=("a", "b", "B")).tolist()
    [[1, 0], [0, 2]]
    """
    rows = np.asarray(logits)
    if rows.ndim != 2 or np.isnan(rows).any():
        raise ValueError(f"logits of shape {rows.shape}; expected [N, C] without NaN")
    if names is not None and len(names) != rows.shape[1]:
        raise ValueError(f"{rows.shape[1]} logits per image, but {len(names)} names")
    groups = tuple(range(rows.shape[1])) if names is None else name_groups(tuple(names))
    _check_k(k, len(set(groups)), "class names are different")
    chosen = np.empty((len(rows), k), np.int64)
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        chosen[part] = _order(rows[part].astype(np.float64), groups)[:, :k]
    return chosen


def _order(rows: NDArray[np.float64], groups: Sequence[int]) -> NDArray[np.int64]:
    """All classes of each row, best first; those that another one of their name beats come last."""
    behind = np.zeros(rows.shape, bool)
    for first in sorted({first for label, first in enumerate(groups) if label != first}):
        same = np.array([label for label, group in enumerate(groups) if group == first])
        best = same[rows[:, same].argmax(1)]  # of equal ones the lowest index
        behind[:, same] = True
        behind[np.arange(len(rows)), best] = False
    return np.lexsort((-rows, behind))  # stable, unlike torch.topk: equal logits stay in the order of the classes


def _check_k(k: int, available: int, what: str) -> None:
    if k < 1:
        raise UserError(f"method.k={k} must be 1 or more")
    if k > available:
        raise UserError(f"method.k={k}, but only {available} {what}; use method.k={available} or less")


def rank(images: Sequence[str], logits: ArrayLike, names: Sequence[str], origin: Origin) -> Candidates:
    """A draft's logits as candidates, the best DEPTH of each image or all if there are fewer names.

    Args:
        images: Keys. Length: N.
        logits: Shape: [N, C].
        names: Of the classes. Length: C.
        origin: Whose logits they are.
    """
    indices = select(logits, min(DEPTH, len(set(name_groups(tuple(names))))), names)
    return Candidates(tuple(images), indices, _of(logits, indices), origin)


def join(parts: Sequence[Candidates], images: Sequence[str]) -> Candidates:
    """The candidates of some images each, of one draft, as those of all.

    Args:
        parts: At least one.
        images: Keys, in the order that the result shall have. Length: N.
    """
    row_of = {image: row for row, image in enumerate(image for part in parts for image in part.images)}
    rows = [row_of[image] for image in images]
    indices, logits = (np.concatenate(each)[rows] for each in zip(*((p.indices, p.logits) for p in parts), strict=True))
    return Candidates(tuple(images), indices, logits, parts[0].origin)


def led_by(shown: Sequence[str], ranking: Sequence[str], order: str) -> tuple[str, ...]:
    """A ranking that begins with the candidates that an image was asked with, whatever the draft prefers by now.

    Args:
        shown: Names, as the prompt listed them.
        ranking: Names, best first.
        order: Of the prompt. After `shuffle` it does not say which of them led, so they stand as in the ranking.

    >>> led_by(("b", "a"), ("a", "b", "c"), "rank"), led_by(("b", "a"), ("a", "b", "c"), "shuffle")
    (('b', 'a', 'c'), ('a', 'b', 'c'))
    """
    rank = {name: number for number, name in enumerate(ranking)}
    best = shown if order == "rank" else sorted(shown, key=lambda name: rank.get(name, len(rank)))
    return tuple(dict.fromkeys((*best, *ranking)))


def _of(logits: ArrayLike, indices: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.take_along_axis(np.asarray(logits), indices, axis=1).astype(np.float64)


def class_mean_logits(features: ArrayLike, means: NDArray[np.float64]) -> NDArray[np.float64]:
    """The draft `class_means`: cosine of an image's feature to every class mean (our choice; the paper uses CaFo).

    Args:
        features: Of the images to classify, not all zero. Shape: [N, D].
        means: Of length 1, see `alert.draft.references.class_means`. Shape: [C, D].

    Returns:
        Cosines. Shape: [N, C].

    Raises:
        ValueError: A feature has length 0 or is not finite.

    >>> class_mean_logits([[0.0, 2.0], [3.0, 4.0]], np.array([[1.0, 0.0], [0.0, 1.0]])).tolist()
    [[0.0, 1.0], [0.6, 0.8]]
    """
    rows = np.asarray(features, np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if bad := np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0))).tolist():
        raise ValueError(f"the feature of image number {bad[0]} has length {lengths[bad[0], 0]}; it has no direction")
    return rows / lengths @ means.T


def oracle_recall(
    images: Sequence[str], logits: ArrayLike, truths: Sequence[int], k: int, names: Sequence[str], origin: Origin
) -> Candidates:
    """The draft `oracle_recall`: the truth and the k - 1 others that a draft ranks highest. An upper bound: it uses the
    labels, and recall@k is 1. For studies of the second stage alone (our choice).

    The k are ordered by the draft's logits, so a truth that the draft misses stands last; `order: shuffle` hides that.

    Args:
        images: Keys. Length: N.
        logits: Of the draft that supplies the others. Shape: [N, C].
        truths: True classes. Length: N.
        k: Candidates per image; no more are kept, since the truth may be the last.
        names: Of the classes. Length: C.
        origin: Of the draft.

    >>> draft = Origin("class_means", "digits", 16, 1)
    >>> made = oracle_recall(["a.png"], [[0.1, 0.9, 0.5, 0.3]], [0], 2, ("w", "x", "y", "z"), draft)
    >>> made.ranking("a.png"), made.origin.method, made.origin.uses_labels
    ((1, 0), 'oracle_recall of class_means', True)
    """
    certain = np.array(logits, np.float64)
    certain[np.arange(len(certain)), np.asarray(truths)] = np.inf
    indices = np.sort(select(certain, k, names), axis=1)  # by class index, so that the stable sort below keeps ties so
    order = np.argsort(-_of(logits, indices), axis=1, kind="stable")
    indices = np.take_along_axis(indices, order, axis=1)
    marked = replace(origin, method=f"oracle_recall of {origin.method}", uses_labels=True)
    return Candidates(tuple(images), indices, _of(logits, indices), marked)
