"""What a model is trained and tested on: `setting.build` names one of these functions.

Each takes the dataset, the others to test on and what to draw, and returns the splits. `val` is what is watched during
training; every other split is a test of its own.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from common.counted import agree, counted
from common.data.sampling import Picks, Sampling, draw, halves
from common.data.source import Dataset
from common.types import Item, Split, UserError


@dataclass(frozen=True)
class Splits:
    """The splits of a task, and in which classes the sampler could not give what it should (see `Picks`)."""

    train: Split
    evaluation: dict[str, Split]
    short: dict[str, int]
    refilled: dict[str, int] = field(default_factory=dict)


def few_shot(data: Dataset, targets: Mapping[str, Dataset], how: Sampling) -> Splits:
    """Train on some images of every class, test on all classes."""
    picks = draw(data.source, how)
    evaluation = _nonempty(val=data.split(picks.val), test=data.split(picks.test))
    return Splits(data.split(picks.train), evaluation, picks.short, picks.refilled)


def base_to_new(data: Dataset, targets: Mapping[str, Dataset], how: Sampling) -> Splits:
    """Train on the first half of the classes; test on them, and on the others among themselves.

    Classes are left out after the draw, so the images are those of `few_shot` with the same seed (CoOp).
    """
    picks = draw(data.source, how)
    base, new = halves(data.source.names)
    if not new:
        raise UserError(f"setting=base_to_new needs two classes or more; data={data.config.name} has one")
    evaluation = _nonempty(
        val=data.split(picks.val, base), base=data.split(picks.test, base), new=data.split(picks.test, new)
    )
    names = {data.source.names[label] for label in base}
    short, refilled = ({k: v for k, v in each.items() if k in names} for each in (picks.short, picks.refilled))
    return Splits(data.split(picks.train, base), evaluation, short, refilled)


def cross_dataset(data: Dataset, targets: Mapping[str, Dataset], how: Sampling) -> Splits:
    """Train on one dataset, test on it and on others, each with its own classes and question."""
    splits = few_shot(data, {}, how)
    others = {
        name: target.split(_tested(target, how).test) for name, target in targets.items() if name != data.config.name
    }
    return Splits(splits.train, splits.evaluation | others, splits.short, splits.refilled)


def shift(data: Dataset, targets: Mapping[str, Dataset], how: Sampling) -> Splits:
    """Train on one dataset, test on it and on other pictures of its classes (CoOp's domain generalisation).

    Raises:
        UserError: A target has a class that was not trained.
    """
    trained = set(data.source.names)
    for name, target in targets.items():
        if strange := sorted(set(target.source.names) - trained):
            raise UserError(
                f"setting=shift: {counted(len(strange), 'class')} of {name} {agree(len(strange), 'is', 'are')} none"
                f" of data={data.config.name},"
                f" first: '{strange[0]}'; choose other targets with setting.test_on, or setting=cross_dataset"
            )
    return cross_dataset(data, targets, how)


def _tested(target: Dataset, how: Sampling) -> Picks:
    """The test images of a target: as few-shot runs on it with the same seed have them."""
    return draw(target.source, how)


def _nonempty(**splits: Split) -> dict[str, Split]:
    return {name: split for name, split in splits.items() if split.items}


def fewer(split: Split, per_class: int) -> Split:
    """Some images of each class, in the split's order: those of the smallest hashes of their keys.

    So they do not depend on the seed but where a draw has trained on some of them.
    """
    by_class: dict[int, list[Item]] = defaultdict(list)
    for item in split.items:
        by_class[item.label].append(item)
    kept = {
        (item.image, item.label)
        for items in by_class.values()
        for item in sorted(items, key=lambda item: hashlib.sha256(item.image.encode()).digest())[:per_class]
    }
    return replace(split, items=tuple(item for item in split.items if (item.image, item.label) in kept))
