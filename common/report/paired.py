"""Two groups on the same images: McNemar's test, and a bootstrap over images and seeds; on others: Newcombe's interval.

Shapes: S seeds, N images of a seed, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.evaluation.metrics import exact_p, newcombe_interval
from common.report.groups import Group, t_interval
from common.run.result import FORMER

DRAWS = 2_000
ROWS = 4_000_000  # random numbers at a time


@dataclass(frozen=True)
class Difference:
    """Of a group's accuracy from another's. seeds: those that both have; interval: 95 %; p: McNemar's, exact, and like
    `fixed` and `broken` None where the images are not the same.
    """

    seeds: tuple[int, ...]
    difference: float
    interval: tuple[float, float]
    fixed: int | None = None
    broken: int | None = None
    p: float | None = None


def compare(group: Group, other: Group, split: str) -> Difference | None:
    """How much better `group` is than `other`; None if they share no seed on that split.

    As soon as one seed has both on the same images, those seeds alone count.
    """
    theirs = {run.values["seed"]: run for run in other.finished}
    found: dict[int, NDArray[np.int8]] = {}
    for run in group.finished:
        seed = run.values["seed"]
        if seed in theirs and run.result is not None and split in run.result.final:
            mine, known = answers(run.path, split), answers(theirs[seed].path, split)
            if mine.keys() == known.keys() and mine:
                found[seed] = np.array([int(mine[key]) - int(known[key]) for key in sorted(mine)], np.int8)
    if not found:
        return _unpaired(group, other, split)
    changes = list(found.values())
    fixed, broken = (int(sum((each == sign).sum() for each in changes)) for sign in (1, -1))
    mean = float(np.mean([each.mean() for each in changes]))
    return Difference(tuple(found), mean, bootstrap(changes), fixed, broken, exact_p(fixed, broken))


def _unpaired(group: Group, other: Group, split: str) -> Difference | None:
    """As of independent images: as many as one seed has, whose accuracy is the mean over the seeds that both have.

    None if they are not of the same task: another dataset or setting has other accuracies for reasons of its own.
    """
    if _task(group) != _task(other):
        return None
    runs = [{run.values["seed"]: run.result for run in each.finished} for each in (group, other)]
    finals = [{seed: r.final[split] for seed, r in each.items() if r and split in r.final} for each in runs]
    seeds = tuple(seed for seed in finals[0] if seed in finals[1])
    if not seeds:
        return None
    shares = [float(np.mean([each[seed].accuracy for seed in seeds])) for each in finals]
    totals = [min(each[seed].n for seed in seeds) for each in finals]
    first, second = ((round(share * n), n) for share, n in zip(shares, totals, strict=True))
    return Difference(seeds, shares[0] - shares[1], newcombe_interval(first, second))


def _task(group: Group) -> tuple[str, str]:
    values = group.runs[0].values
    return values["data"]["name"], values["setting"]["name"]


def answers(folder: Path, split: str) -> dict[str, bool]:
    """Whether each image of a split was right at the end of a run."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(
        folder / "predictions.parquet", columns=["phase", "split", "image", "correct"]
    ).to_pydict()
    rows = [(FORMER.get(phase, phase), *rest) for phase, *rest in zip(*table.values(), strict=True)]
    last = "after" if any(phase == "after" for phase, *_ in rows) else "before"
    return {image: right for phase, where, image, right in rows if phase == last and where == split}


def bootstrap(changes: Sequence[NDArray[np.int8]], draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean difference: seeds are drawn with replacement, then images of each.

    With one seed images alone are drawn, which says nothing of other seeds. A few seeds drawn with replacement differ
    less than they do: with three it holds as little as 79 % where seeds differ more than images explain. So it is
    never narrower than Student's interval of the seeds' differences; together they hold 95 % (tests/test_compare.py
    simulates it). Images of different seeds are drawn apart, since they are other images where a dataset has no test
    split of its own.

    Args:
        changes: Per seed: 1 where only the first is right, -1 where only the second is, else 0. Shape: S times [N].
        draws: B.
        seed: Of the draws.
    """
    generator = np.random.default_rng(seed)
    means = np.empty((draws, len(changes)))
    for number, each in enumerate(changes):
        # how often an image with each sign is drawn is all that counts
        shares = [float((each == sign).mean()) for sign in (1, -1, 0)]
        counts = generator.multinomial(len(each), shares, draws)
        means[:, number] = (counts[:, 0] - counts[:, 1]) / len(each)
    chosen = generator.integers(len(changes), size=means.shape)
    low, high = np.quantile(np.take_along_axis(means, chosen, 1).mean(1), [0.025, 0.975])
    if len(changes) > 1:
        bounds = t_interval([float(each.mean()) for each in changes])
        low, high = min(low, bounds[0]), max(high, bounds[1])
    return float(low), float(high)
