"""What seeds and images leave open: intervals of means over seeds, of differences, of numbers computed from others.

Shapes: S seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from common.evaluation.metrics import wilson_interval


def mean_std(numbers: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation over seeds (S - 1 in the denominator); None of one.

    >>> mean_std([1.0, 3.0]), mean_std([2.0])
    ((2.0, 1.4142135623730951), (2.0, None))
    """
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None


def interval(numbers: Sequence[float], images: Sequence[tuple[float, float]] = ()) -> tuple[float, float] | None:
    """The 95 % interval of the mean over seeds: Student's and that of the images, whichever reaches further.

    Seeds that agree to the last image leave the images a sample; seeds mostly share theirs, so the mean is no surer of
    them than one seed. None: of one seed without images.

    Args:
        numbers: One per seed. Length: S.
        images: What each seed's images leave open, in the same unit; empty: the numbers are not of images. Length: S.

    >>> interval([0.5, 0.5, 0.5], [(0.25, 0.75)] * 3), interval([0.5], [(0.25, 0.75)]), interval([3.0])
    ((0.25, 0.75), (0.25, 0.75), None)
    """
    bounds = [t_interval(numbers)] if len(numbers) > 1 else []
    if images:
        bounds.append((statistics.fmean(low for low, _ in images), statistics.fmean(high for _, high in images)))
    return (min(low for low, _ in bounds), max(high for _, high in bounds)) if bounds else None


def t_interval(numbers: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean over seeds, by Student's t with S - 1 degrees of freedom."""
    from scipy.stats import t  # a second to import

    mean, std = mean_std(numbers)
    assert std is not None, "one seed has no interval over seeds"
    half = float(t.ppf(0.975, len(numbers) - 1)) * std / math.sqrt(len(numbers))
    return mean - half, mean + half


def newcombe_interval(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float]:
    """The 95 % interval of the difference of two independent proportions (Newcombe 1998, method 10).

    Args:
        first: Successes and total.
        second: Those that are subtracted.

    Newcombe's Table II (a), 56 of 70 less 48 of 80:

    >>> [round(bound, 4) for bound in newcombe_interval((56, 70), (48, 80))]
    [0.0524, 0.3339]
    """
    parts = [(right / n, wilson_interval(right, n)) for right, n in (first, second)]
    below, above = reach(parts, (1.0, -1.0))
    difference = parts[0][0] - parts[1][0]
    return difference - below, difference + above


def reach(parts: Sequence[tuple[float, tuple[float, float]]], slopes: Sequence[float]) -> tuple[float, float]:
    """How far below and above itself the interval of a number reaches that is computed from independent others.

    The squared distances of their own intervals add up (Zou and Donner 2008); of a function that is no sum, to first
    order.

    Args:
        parts: The others with their intervals.
        slopes: How much the number grows with each of them.

    The mean of two numbers:

    >>> reach([(5.0, (2.0, 6.0)), (7.0, (3.0, 9.0))], (0.5, 0.5))
    (2.5, 1.118033988749895)
    """
    down, up = [], []
    for (value, (low, high)), slope in zip(parts, slopes, strict=True):
        ends = sorted((slope * (low - value), slope * (high - value)))
        down.append(ends[0])
        up.append(ends[1])
    return math.hypot(*down), math.hypot(*up)
