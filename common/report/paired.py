"""Two groups on the same images: their difference over seeds and images, which both are samples; on others: Newcombe's
interval.

Shapes: S seeds, N images of all seeds together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.evaluation.metrics import exact_p
from common.report.groups import Group, photos
from common.report.intervals import newcombe_interval, t_interval

OWN = ("val", "test", "base", "new")  # splits of the dataset that was trained on; others are called by their own


@dataclass(frozen=True)
class Difference:
    """Of a group's accuracy from another's. seeds: those that both have; interval: 95 %; p: see `over_seeds`, or
    None on other images.
    """

    seeds: tuple[int, ...]
    difference: float
    interval: tuple[float, float]
    p: float | None = None


def compare(group: Group, other: Group, split: str) -> Difference | None:
    """How much better `group` is than `other`; None if they share no seed on that split, or it is of other datasets.

    As soon as one seed has both on the same images, those seeds alone count.
    """
    if split in OWN and _dataset(group) != _dataset(other):
        return None  # names of images may be the same all the same
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


def _unpaired(group: Group, other: Group, split: str) -> Difference | None:
    """As of independent images: as many as one seed has, whose accuracy is the mean over the seeds that both have. Its
    interval is never narrower than Student's of the seeds' differences.

    None if they are not of the same task: another dataset or setting has other accuracies for reasons of its own.
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
        low, high = min(low, bounds[0]), max(high, bounds[1])
    return Difference(seeds, shares[0] - shares[1], (low, high))


def _dataset(group: Group) -> str:
    return photos(group.runs[0].values)


def answers(folder: Path, split: str) -> dict[str, bool]:
    """Whether each image of a split was right at the end of a run."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(
        folder / "predictions.parquet", columns=["phase", "split", "image", "correct"]
    ).to_pydict()
    rows = list(zip(*table.values(), strict=True))
    last = "after" if any(phase == "after" for phase, *_ in rows) else "before"
    return {image: right for phase, where, image, right in rows if phase == last and where == split}


def aligned(changes: Sequence[Mapping[str, int]]) -> NDArray[np.float64]:
    """One row per seed, one column per image of any seed, NaN where a seed has not that image. Shape: [S, N].

    >>> aligned([{"a": 1, "b": 0}, {"b": -1, "c": 0}]).tolist()
    [[1.0, 0.0, nan], [nan, -1.0, 0.0]]
    """
    keys = sorted(set().union(*changes))
    return np.array([[each.get(key, np.nan) for key in keys] for each in changes], np.float64)


def over_seeds(changes: NDArray[np.float64]) -> tuple[float, tuple[float, float], float]:
    """The mean difference of two classifiers, its 95 % interval and its two-sided p-value.

    Seeds that are tested on the same images are no independent tests: what is hard about an image is hard with every
    seed. So the variance of the mean is that of the seeds' means over S, plus the covariance that common images give
    two of them, with the degrees of freedom that follow (Obuchowski and Rockette 1995 and Hillis 2007, whose readers
    are seeds and whose cases are images). A few seeds tell that covariance badly, so neither is the interval narrower
    nor p smaller than Student's over the seeds' means. tests/test_compare.py simulates both.

    Every seed counts two images more, one that changed each way: without them few changes would look like none. With
    one seed the interval is then Bonett and Price's (2012); p is McNemar's exact one.

    Args:
        changes: 1 where only the first is right, -1 where only the second is, else 0; NaN: not tested. Shape: [S, N].
    """
    from scipy.special import stdtr, stdtrit  # Student's distribution; infinite degrees of freedom: the normal one

    seeds = len(changes)
    mean = float(np.nanmean(changes, 1).mean())
    table = np.hstack([changes, np.ones((seeds, 1)), -np.ones((seeds, 1))])
    there, means = ~np.isnan(table), np.nanmean(table, 1)
    apart = np.where(there, table - means[:, None], 0.0)
    counts = there.sum(1)
    covariances = apart @ apart.T / np.outer(counts, counts)  # of the seeds' means, by their common images
    own = float(covariances.trace())
    images = max(0.0, float(covariances.sum()) - own) / (seeds * max(1, seeds - 1))
    spread = float(means.var(ddof=1)) / seeds if np.ptp(means) else 0.0
    if not spread:  # one seed, or seeds that are equal on average: their images are apart at least
        images = max(images, own / seeds**2)
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
