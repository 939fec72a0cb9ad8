"""Few-shot picks: `coop`, exactly as CoOp draws them, so that a seed means the same images as in the field's published
numbers; and `clsrl`, as the CLS-RL authors' notebook does, with a seed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from common.types import Item, Source, UserError

SAMPLERS = ("coop", "clsrl")
VALIDATIONS = ("few", "full", "none")
TEST_ROWS = ("test", "val_and_test")


@dataclass(frozen=True)
class Sampling:
    """What to draw.

    Args:
        shots: Images per class; None: all.
        seed: Of the draw; CoOp's are 1, 2, 3.
        sampler: `coop` or `clsrl`.
        validation: `few` (CoOp: as many as shots, at most 4), `full` or `none`.
        test_rows: `test`, or `val_and_test` (the CLS-RL authors' test set).
    """

    shots: int | None
    seed: int
    sampler: str = "coop"
    validation: str = "few"
    test_rows: str = "test"


@dataclass(frozen=True)
class Picks:
    """The images of a few-shot problem. `short`: classes with fewer training images than shots, with their number."""

    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]
    short: dict[str, int]


def by_label(items: Sequence[Item]) -> dict[int, list[Item]]:
    """Items grouped by label, labels in order of first appearance, items in list order."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    return groups


def pick(items: Sequence[Item], shots: int | None, rng: random.Random) -> list[Item]:
    """`shots` items of every class; a class with fewer is taken whole and draws nothing from `rng`.

    Dassl's `generate_fewshot_dataset` without repetition.
    """
    if shots is None:
        return list(items)
    chosen: list[Item] = []
    for group in by_label(items).values():
        chosen += rng.sample(group, shots) if len(group) >= shots else group
    return chosen


def pick_globally(items: Sequence[Item], shots: int | None, rng: random.Random) -> list[Item]:
    """Shuffle all items, then take each while its class still needs one (the CLS-RL authors' notebook, unseeded there).

    They count by name: two classes of one name share twice the shots.
    """
    if shots is None:
        return list(items)
    labels = {(item.label, item.name) for item in items}
    needed = {name: shots * count for name, count in Counter(name for _, name in labels).items()}
    shuffled = list(items)
    rng.shuffle(shuffled)
    chosen = []
    for item in shuffled:
        if needed[item.name] > 0:
            needed[item.name] -= 1
            chosen.append(item)
    return chosen


def draw(source: Source, how: Sampling) -> Picks:
    """Pick training and validation images: train first, then val, from one stream of `random.Random(seed)`.

    A source without a test split is tested on all its images that were not picked.

    Raises:
        UserError: Nothing would be left to test a class on, or parts of the source overlap.
    """
    if not source.test:
        if not source.train:
            raise UserError("the dataset has neither training nor test images")
        _check_rest(source, how.shots)
    rng = random.Random(how.seed)
    take = pick if how.sampler == "coop" else pick_globally
    train = take(source.train, how.shots, rng)
    val = _validation(source.val, how, rng)
    picked = {item.image for item in train}
    test = source.test or tuple(item for item in source.train if item.image not in picked)
    if how.test_rows == "val_and_test":
        test, val = (*source.val, *test), []
    short = {} if how.shots is None else _short(source, train, how)
    return Picks(tuple(train), tuple(val), test, short)


def _validation(items: Sequence[Item], how: Sampling, rng: random.Random) -> list[Item]:
    if how.validation == "none":
        return []
    return pick(items, None if how.validation == "full" or how.shots is None else min(how.shots, 4), rng)


def _short(source: Source, train: Sequence[Item], how: Sampling) -> dict[str, int]:
    """Names with fewer images than `shots` for each of their classes; `coop` picks class by class, `clsrl` by name."""
    picked, found = Counter(item.label for item in train), dict[str, int]()
    for name in dict.fromkeys(source.names):
        counts = [picked[label] for label, other in enumerate(source.names) if other == name and picked[label]]
        wanted = (how.shots or 0) * len(counts)
        if sum(counts) < wanted if how.sampler == "clsrl" else any(count < (how.shots or 0) for count in counts):
            found[name] = sum(counts)
    return found


def _check_rest(source: Source, shots: int | None) -> None:
    smallest = min(by_label(source.train).values(), key=len)
    if shots is None or len(smallest) <= shots:
        raise UserError(
            f"shots={shots or 'all'}, but class '{smallest[0].name}' has only {len(smallest)} images and at least one"
            f" must be left to test on, since the dataset has no test split; use shots={len(smallest) - 1} or fewer"
        )


def halves(names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Base and new labels: the first ceil(C / 2), and the rest (CoCoOp, Zhou et al. 2022).

    >>> halves("abcde")
    ([0, 1, 2], [3, 4])
    """
    first = (len(names) + 1) // 2
    return list(range(first)), list(range(first, len(names)))
