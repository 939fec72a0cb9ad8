"""Compute intervals and tests over seeds and images: of means, of differences, of two groups on the same images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.evaluation.metrics import exact_p, wilson_interval
from common.report.folders import SeedGroup, photos

# Intervals of means over seeds, of differences, and of numbers computed from others.
#
# Shapes: S seeds.


def mean_std(numbers: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and standard deviation over seeds (S - 1 in the denominator; None for one seed).

    >>> mean_std([1.0, 3.0]), mean_std([2.0])
    ((2.0, 1.4142135623730951), (2.0, None))
    """
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None


def interval(
    numbers: Sequence[float], images: Sequence[tuple[float, float]] = (), most: float | None = None
) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean over seeds: the hull of Student's interval and that of the images.

    Even if all seeds agree, the images remain a sample; seeds mostly share their images, so the mean is no more certain
    than one seed in this respect. None for one seed without image intervals.

    Args:
        numbers: One per seed. Length: S.
        images: Interval of each seed's number over its images, in the same unit; empty: not a number of images. Length:
            S.
        most: Largest number that there can be, if they are shares, 1 or 100; two seeds often say more than that.

    >>> interval([0.5, 0.5, 0.5], [(0.25, 0.75)] * 3), interval([0.5], [(0.25, 0.75)]), interval([3.0])
    ((0.25, 0.75), (0.25, 0.75), None)
    >>> interval([0.6, 0.8], most=1.0)
    (0.0, 1.0)
    """
    bounds = [t_interval(numbers)] if len(numbers) > 1 else []
    if images:
        bounds.append((statistics.fmean(low for low, _ in images), statistics.fmean(high for _, high in images)))
    if not bounds:
        return None
    low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
    return (low, high) if most is None else (max(low, 0.0), min(high, most))


def t_interval(numbers: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean over seeds, by Student's t with S - 1 degrees of freedom."""
    from scipy.stats import t  # here, because the import takes a second

    mean, std = mean_std(numbers)
    assert std is not None, "one seed has no interval over seeds"
    half = float(t.ppf(0.975, len(numbers) - 1)) * std / math.sqrt(len(numbers))
    return mean - half, mean + half


def newcombe_interval(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two independent proportions (Newcombe 1998, method 10).

    Args:
        first: Successes and total.
        second: Successes and total that are subtracted.

    Newcombe's Table II (a), 56 of 70 less 48 of 80:

    >>> [round(bound, 4) for bound in newcombe_interval((56, 70), (48, 80))]
    [0.0524, 0.3339]
    """
    parts = [(right / n, wilson_interval(right, n)) for right, n in (first, second)]
    below, above = reach(parts, (1.0, -1.0))
    difference = parts[0][0] - parts[1][0]
    return difference - below, difference + above


def reach(parts: Sequence[tuple[float, tuple[float, float]]], slopes: Sequence[float]) -> tuple[float, float]:
    """Return how far the interval of a number extends below and above it, computed from independent parts.

    The squared distances of the parts' intervals add up (Zou and Donner 2008); for a function that is not a sum, to
    first order.

    Args:
        parts: The parts with their intervals.
        slopes: Derivative of the number with respect to each part.

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


# Comparison of two groups: on the same images over seeds and images, both samples; else by Newcombe's interval.
#
# Shapes: S seeds, N images of all seeds together.

OWN = ("val", "test", "base", "new")  # splits of the training dataset; other splits are named after their dataset


@dataclass(frozen=True)
class Difference:
    """Difference of a group's accuracy from another's. seeds: seeds that both have; interval: 95 %; p: see
    `over_seeds`, or None on other images.
    """

    seeds: tuple[int, ...]
    difference: float
    interval: tuple[float, float]
    p: float | None = None


def compare_groups(group: SeedGroup, other: SeedGroup, split: str) -> Difference | None:
    """Compare two groups; None if they share no seed on that split, or their datasets differ.

    If any seed has both groups on the same images, only such seeds count.
    """
    if split in OWN and _dataset(group) != _dataset(other):
        return None  # keys of images may be equal nevertheless
    theirs = {run.values["seed"]: run for run in other.finished}
    found: dict[int, dict[str, int]] = {}
    for run in group.finished:
        seed = run.values["seed"]
        if seed in theirs and run.result is not None and split in run.result.final:
            mine, known = answers(run.path, split), answers(theirs[seed].path, split)
            if mine.keys() == known.keys() and mine:
                found[seed] = {key: int(mine[key]) - int(known[key]) for key in mine}
    if not found:
        return _unpaired(group, other, split)
    return Difference(tuple(found), *over_seeds(aligned([*found.values()])))


def _unpaired(group: SeedGroup, other: SeedGroup, split: str) -> Difference | None:
    """Compare as for independent images: the number of images of one seed, with the mean accuracy over the seeds that
    both have. The interval is never narrower than Student's for the seeds' differences.

    None if the tasks differ: accuracies on another dataset or setting differ for other reasons.
    """
    settings = [each.runs[0].values["setting"]["name"] for each in (group, other)]
    if _dataset(group) != _dataset(other) or settings[0] != settings[1]:
        return None
    runs = [{run.values["seed"]: run.result for run in each.finished} for each in (group, other)]
    finals = [{seed: r.final[split] for seed, r in each.items() if r and split in r.final} for each in runs]
    seeds = tuple(seed for seed in finals[0] if seed in finals[1])
    if not seeds:
        return None
    shares = [float(np.mean([each[seed].accuracy for seed in seeds])) for each in finals]
    totals = [min(each[seed].n for seed in seeds) for each in finals]
    first, second = ((round(share * n), n) for share, n in zip(shares, totals, strict=True))
    low, high = newcombe_interval(first, second)
    if len(seeds) > 1:
        bounds = t_interval([finals[0][seed].accuracy - finals[1][seed].accuracy for seed in seeds])
        low, high = max(-1.0, min(low, bounds[0])), min(1.0, max(high, bounds[1]))
    return Difference(seeds, shares[0] - shares[1], (low, high))


def _dataset(group: SeedGroup) -> str:
    return photos(group.runs[0].values)


def answers(folder: Path, split: str) -> dict[str, bool]:
    """Return for each image of a split whether it was right at the end of a run."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(
        folder / "predictions.parquet", columns=["phase", "split", "image", "correct"]
    ).to_pydict()
    rows = list(zip(*table.values(), strict=True))
    last = "after" if any(phase == "after" for phase, *_ in rows) else "before"
    return {image: right for phase, where, image, right in rows if phase == last and where == split}


def aligned(changes: Sequence[Mapping[str, int]]) -> NDArray[np.float64]:
    """Return one row per seed, one column per image of any seed, NaN for an image that a seed lacks. Shape: [S, N].

    >>> aligned([{"a": 1, "b": 0}, {"b": -1, "c": 0}]).tolist()
    [[1.0, 0.0, nan], [nan, -1.0, 0.0]]
    """
    keys = sorted(set().union(*changes))
    return np.array([[each.get(key, np.nan) for key in keys] for each in changes], np.float64)


def over_seeds(changes: NDArray[np.float64]) -> tuple[float, tuple[float, float], float]:
    """Return the mean difference of two classifiers, its 95 % interval and its two-sided p-value.

    Seeds tested on the same images are not independent tests: an image that is hard is hard with every seed. So the
    variance of the mean is that of the seeds' means over S, plus the covariance that common images give two of them,
    with the degrees of freedom that follow (Obuchowski and Rockette 1995 and Hillis 2007, whose readers are seeds and
    whose cases are images). A few seeds estimate that covariance badly, so neither is the interval narrower nor p
    smaller than Student's over the seeds' means. tests/test_compare.py simulates both.

    Two images are added to every seed, one that changed each way: otherwise few changes would look like none. With one
    seed the interval is then Bonett and Price's (2012); p is McNemar's exact one.

    Args:
        changes: 1 where only the first is right, -1 where only the second is, else 0; NaN: not tested. Shape: [S, N].
    """
    from scipy.special import stdtr, stdtrit  # Student's distribution; infinite degrees of freedom: the normal one

    # the added images, and each seed's deviations from its mean
    seeds = len(changes)
    mean = float(np.nanmean(changes, 1).mean())
    table = np.hstack([changes, np.ones((seeds, 1)), -np.ones((seeds, 1))])
    there, means = ~np.isnan(table), np.nanmean(table, 1)
    apart = np.where(there, table - means[:, None], 0.0)
    counts = there.sum(1)
    # covariances of the seeds' means by their common images; the diagonal is their own variance
    covariances = apart @ apart.T / np.outer(counts, counts)
    own = float(covariances.trace())
    images = max(0.0, float(covariances.sum()) - own) / (seeds * max(1, seeds - 1))
    spread = float(means.var(ddof=1)) / seeds if np.ptp(means) else 0.0
    if not spread:  # one seed, or seeds with equal means: at least the variance of the images remains
        images = max(images, own / seeds**2)
    # standard error, degrees of freedom, interval and p-value
    error = math.sqrt(spread + images)
    freedom = (seeds - 1) * ((spread + images) / spread) ** 2 if spread else math.inf
    centre, half = float(means.mean()), float(stdtrit(freedom, 0.975)) * error
    p = 2 * float(stdtr(freedom, -abs(centre) / error))
    if seeds == 1:
        p = exact_p(int((changes == 1).sum()), int((changes == -1).sum()))
    elif spread:
        half = max(half, float(stdtrit(seeds - 1, 0.975)) * math.sqrt(spread))
        p = max(p, 2 * float(stdtr(seeds - 1, -abs(centre) / math.sqrt(spread))))
    return mean, (max(-1.0, centre - half), min(1.0, centre + half)), p
