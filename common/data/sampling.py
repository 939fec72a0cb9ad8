"""Few-shot picks exactly as CoOp draws them, so that a seed means the same images as in the field's published numbers.

Dassl's `generate_fewshot_dataset` with CoOp's seeding: one stream of `random.Random(seed)`, train first, then val.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from common.types import Item, Source, Task, UserError


def by_label(items: Sequence[Item]) -> dict[int, list[Item]]:
    """Items grouped by label, labels in order of first appearance, items in list order."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    return groups


def pick(items: Sequence[Item], shots: int, rng: random.Random) -> list[Item]:
    """`shots` items of every class; a class with fewer is taken whole and draws nothing from `rng`."""
    chosen: list[Item] = []
    for group in by_label(items).values():
        chosen += rng.sample(group, shots) if len(group) >= shots else group
    return chosen


def few_shot(source: Source, shots: int, seed: int) -> Task:
    """Pick the training images; test on the source's test split or, where it has none, on all images not picked.

    Raises:
        UserError: A class has fewer than `shots` images, or none is left to test on.
    """
    if not source.test:
        smallest = min(by_label(source.train).values(), key=len)
        if len(smallest) <= shots:
            raise UserError(
                f"shots={shots}, but class '{smallest[0].name}' has only {len(smallest)} images and at least one must"
                f" be left to test on; use shots={len(smallest) - 1} or fewer"
            )
    rng = random.Random(seed)
    train = pick(source.train, shots, rng)
    val = pick(source.val, min(shots, 4), rng)
    picked = {item.image for item in train}
    test = source.test or tuple(item for item in source.train if item.image not in picked)
    _check_disjoint(train, {"val": val, "test": test})
    evaluation = {"val": tuple(val), "test": tuple(test)}
    return Task(
        source.names,
        tuple(train),
        {name: items for name, items in evaluation.items() if items},
        source.open,
        source.fingerprint,
    )


def _check_disjoint(train: Sequence[Item], others: dict[str, Sequence[Item]]) -> None:
    picked = {item.image for item in train}
    for name, items in others.items():
        if shared := picked.intersection(item.image for item in items):
            raise UserError(f"{len(shared)} training images are also in {name}, first: {min(shared)}")
