"""Choose which categories a training prompt shows beside the true one (ALERT section 3.3).

Similar categories are shown more often: the weights are a softmax of the cosines of class means. No torch.

Shapes: N images, D features per image, C classes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.few_shot.candidates import name_groups
from common.types import UserError


def class_means(features: ArrayLike, labels: ArrayLike, classes: int) -> NDArray[np.float64]:
    """Return the L2-normalised mean feature of every class: the two factors of l in section 3.3.

    As in the equation, images are averaged as they are and only the mean is normalised, so a longer feature counts
    more. What a feature is when an image has several tokens, the paper leaves open; the caller pools them.

    Args:
        features: Features of the few-shot images. Shape: [N, D].
        labels: Class indices. Shape: [N].
        classes: C.

    Returns:
        Rows of length 1. Shape: [C, D].

    Raises:
        ValueError: A class has no image or a mean of length 0, or the shapes or labels do not fit.

    The first class has the mean (4, 0), the second (1.5, 3), of length 1.5 times the root of 5:

    >>> class_means([[3, 0], [5, 0], [0, 2], [3, 4]], [0, 0, 1, 1], classes=2).round(4).tolist()
    [[1.0, 0.0], [0.4472, 0.8944]]
    """
    rows, of = np.asarray(features), np.asarray(labels)
    if rows.ndim != 2 or of.shape != rows.shape[:1]:
        raise ValueError(f"features of shape {rows.shape} and labels of shape {of.shape}; expected [N, D] and [N]")
    if outside := sorted({int(label) for label in of if not 0 <= label < classes}):
        raise ValueError(f"label {outside[0]} is not one of {classes} classes")
    counts = np.bincount(of.astype(np.int64), minlength=classes)
    if not counts.all():
        raise ValueError(f"class {int(counts.argmin())} has no image to take a mean of")
    means = np.zeros((classes, rows.shape[1]))  # fp64, and no second copy: rows of patches have millions of numbers
    for row, label in zip(rows, of.astype(np.int64), strict=True):
        means[label] += row
    means /= counts[:, None]
    lengths = np.array([np.linalg.norm(mean) for mean in means])
    if bad := np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0))).tolist():
        raise ValueError(f"the mean feature of class {bad[0]} has length {lengths[bad[0]]}; it has no direction")
    means /= lengths[:, None]
    return means


def similarities(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the logits l of section 3.3: cosines between class means.

    Args:
        means: Class means from `class_means`. Shape: [C, D].

    Returns:
        Cosines; row: true class, column: other class. Shape: [C, C].

    >>> similarities(np.array([[1.0, 0.0], [0.6, 0.8]])).tolist()
    [[1.0, 0.6], [0.6, 1.0]]
    """
    return means @ means.T


def weights(similarity_row: Sequence[float], tau: float) -> list[float]:
    """Return softmax(l / tau), the weights w of section 3.3.

    Computed in Python floats with the exact `math.fsum`, since NumPy's order of summation depends on the machine and
    the result of `sum` on the Python version. Only the last bit of `exp` may still differ.

    Args:
        similarity_row: Finite numbers. Length: C, or the number of classes to choose from.
        tau: Temperature above 0; the paper's is 0.1 (section 4.1).

    Returns:
        Positive numbers (0 where the difference is beyond what a float holds) that add up to 1, in the same order.

    With tau 0.1, similarities 1, 0.9 and 0.8 are 1 and 2 units apart: e^0, e^-1, e^-2 over their sum of 1.5032.

    >>> [round(w, 4) for w in weights([1.0, 0.9, 0.8], tau=0.1)]
    [0.6652, 0.2447, 0.09]

    The equation's sum runs over all classes, the true one (similarity 1) included. Since that one is not drawn again,
    only the odds of the others matter, and those are the same without it: 0.2447 to 0.09 is 0.7311 to 0.2689.

    >>> [round(w, 4) for w in weights([0.9, 0.8], tau=0.1)]
    [0.7311, 0.2689]
    """
    largest = max(similarity_row)
    grown = [math.exp((similarity - largest) / tau) for similarity in similarity_row]  # at most 1: no overflow
    total = math.fsum(grown)
    return [value / total for value in grown]


def sample_references(
    truth: int,
    similarity_row: ArrayLike,
    names: Sequence[str],
    rng: random.Random,
    *,
    tau: float,
    smallest: int = 2,
    largest: int = 8,
) -> tuple[int, ...]:
    """Draw the categories of one training prompt: the true one and similar ones, in random order (section 3.3).

    Their number is uniform between `smallest` and `largest` (2 and 8 in section 4.1), at most the number of different
    names. The others are drawn one by one without replacement, each by the renormalised weights of the remaining
    classes. That draws are without replacement and the order is random is our reading; the paper does not say. Two
    classes of one name (ImageNet has such pairs) are never shown together, since no answer could tell them apart; the
    true class keeps its own index.

    Only `random`, `randint`, `choices` and `shuffle` of `rng` are used, so the same `rng` and similarities give the
    same draw on Python 3.11 to 3.13 and, but for the last bit of `exp` (one draw in about 1e13), on every machine.

    Args:
        truth: Index of the true class.
        similarity_row: Similarities l between the true class and every class, itself included. Length: C.
        names: Names of all classes as the prompt shows them. Length: C.
        rng: Random generator, seeded by the caller.
        tau: Temperature above 0; the smaller, the more similar the drawn categories.
        smallest: Smallest number of references, the true class included.
        largest: Largest number of references.

    Returns:
        Class indices, the true one at a random position.

    Raises:
        UserError: `tau`, `smallest` or `largest` is not possible.
        ValueError: The similarities are not one finite number per name, or there is no class `truth`.

    With a tau near 0 the nearest class is drawn, here 2; class 1 shares the name of the true class 0.

    >>> draw = sample_references(0, [1.0, 0.9, 0.8, 0.7], ("a", "a", "b", "c"), random.Random(1), tau=1e-6, largest=2)
    >>> sorted(draw)
    [0, 2]
    """
    row = np.asarray(similarity_row, np.float64)
    if row.shape != (len(names),) or not np.isfinite(row).all():
        raise ValueError(f"similarities of shape {row.shape} for {len(names)} names; expected one finite number each")
    if not 0 <= truth < len(names):
        raise ValueError(f"class {truth} is not one of {len(names)} classes")
    # classes with the same name form a group; once one of them is drawn, the whole group leaves the pool
    groups = name_groups(tuple(names))
    size = rng.randint(smallest, _most(len(set(groups)), tau, smallest, largest))
    logits = row.tolist()
    chosen = [truth]
    pool = [label for label, group in enumerate(groups) if group != groups[truth]]
    while len(chosen) < size:
        (drawn,) = rng.choices(pool, weights([logits[label] for label in pool], tau))
        chosen.append(drawn)
        pool = [label for label in pool if groups[label] != groups[drawn]]
    rng.shuffle(chosen)
    return tuple(chosen)


def _most(different: int, tau: float, smallest: int, largest: int) -> int:
    """Return the upper end of the number of references; `different`: number of different names.

    Raises:
        UserError: Names the value that is not possible.
    """
    if not 0 < tau < math.inf:
        raise UserError(f"method.tau={tau} must be a finite number above 0 (the paper's is 0.1)")
    if smallest < 1:
        raise UserError(f"method.smallest={smallest} must be 1 or more, since the true category is always shown")
    if largest < smallest:
        raise UserError(f"method.largest={largest} is below method.smallest={smallest}; raise largest")
    if different < smallest:
        raise UserError(f"method.smallest={smallest}, but there are {different} different class names; lower it")
    return min(largest, different)
