"""Few-shot sampling: `coop`, exactly as CoOp draws, so that a seed means the same images as in published results;
and `clsrl`, as in the CLS-RL authors' notebook, with a seed.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from common.counted import agree, counted
from common.types import Item, Source, UserError


@dataclass(frozen=True)
class Sampling:
    """What to draw from a dataset.

    Args: shots: Images per class; None: all.
    seed: Seed of the draw; CoOp uses 1, 2, 3.
    sampler: `coop` or `clsrl`.
    validation: `few` (CoOp: as many as shots, at most 4), `full`, `none`, or `held_out`: as `few`, but if the
        source has no validation images, as many of its training images that were not picked.
    test_rows: `test`, or `val_and_test` (the CLS-RL authors' test set).
    trains: Whether training images are used. If not, none is taken, so all images of a pool are tested.
    held_out: Images of a pool that are not tested, since the model was trained on them.
    unusable: Images that are left out after the draw, so that the other picks stay the same.
    refill: Replace unusable images that were picked for training by others of their class.
    test_share: Share of each class's images of a pool that is set apart for the test before the draw; None: what was
        not picked is tested.
    """

    shots: int | None
    seed: int
    sampler: str = "coop"
    validation: str = "few"
    test_rows: str = "test"
    trains: bool = True
    held_out: frozenset[str] = frozenset()
    unusable: frozenset[str] = frozenset()
    refill: bool = False
    test_share: float | None = None


@dataclass(frozen=True)
class Picks:
    """The images of a few-shot problem. `short`: number of training images of classes that have fewer than shots.
    `refilled`: number of unusable images that were replaced, by class.
    """

    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]
    short: dict[str, int]
    refilled: dict[str, int] = field(default_factory=dict)


def by_label(items: Sequence[Item]) -> dict[int, list[Item]]:
    """Group items by label, labels in order of first appearance, items in list order."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    return groups


def pick(items: Sequence[Item], shots: int | None, rng: random.Random) -> list[Item]:
    """Draw `shots` items of every class; a class with fewer is taken whole and draws nothing from `rng`.

    This is Dassl's `generate_fewshot_dataset` without repetition.
    """
    if shots is None:
        return list(items)
    chosen: list[Item] = []
    for group in by_label(items).values():
        chosen += rng.sample(group, shots) if len(group) >= shots else group
    return chosen


def pick_globally(items: Sequence[Item], shots: int | None, rng: random.Random) -> list[Item]:
    """Shuffle all items, then take each while its class still needs one (the CLS-RL authors' notebook, unseeded there).

    The notebook counts by name: two classes of one name share twice the shots.
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
    """Draw training and validation images: train first, then val, from one stream of `random.Random(seed)`.

    A source without a test split is a pool: all its images that were not picked are tested, or the share of them that
    was set apart before the draw.

    Raises:
        UserError: No image of a class would be left to test on, or no usable image of a part.
    """
    pool = not source.test and how.test_share is None
    added = [item for item in source.train if item.image in source.added]
    if pool and how.trains:
        _check_rest(source, how.shots)
    if not source.test and how.test_share is not None:
        rest, test = set_apart(
            [item for item in source.train if item.image not in source.added], how.test_share, how.seed
        )
        source = replace(
            source, train=(*rest, *added), test=tuple(item for item in test if item.image not in how.held_out)
        )
    # the draw, with all images, whether usable or not
    rng = random.Random(how.seed)
    take = pick if how.sampler == "coop" else pick_globally
    picked = take(source.train, how.shots, rng)  # even if none is used: val follows in the same stream
    val = _validation(source.val, how, rng)
    # changes after the draw, none of which moves the stream of the picks above
    picked = picked if how.trains else []
    train = _replaced(source.train, picked, how, keep=int(pool))
    if how.validation == "held_out" and not source.val:
        val = _held_out(_others(source.train, picked, train), how, keep=int(pool))
    # what is left of a pool is the test set
    rest = _others(source.train, picked, train, val) if pool else list(source.test)
    test = [item for item in rest if not pool or item.image not in how.held_out | source.added]
    if how.test_rows == "val_and_test":
        test, val = [*source.val, *test], []
    train, val, test = (_usable(part, how) for part in (train, val, test))
    short = _short(source, train, how) if how.trains and how.shots is not None else {}
    refilled = Counter(item.name for item in set(train).difference(picked))
    return Picks(tuple(train), tuple(val), tuple(test), short, dict(sorted(refilled.items())))


def set_apart(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Split the images of a pool into those to draw from and those to test on, in their order.

    Of the n images of a class round(share * n) are tested, at least one and at most n - 1. Images of one group go
    together, so that their classes can have fewer or more; a class with one image or group is not tested.
    """
    sizes = Counter(item.label for item in items)
    wanted = {label: min(max(1, round(share * size)), size - 1) for label, size in sizes.items()}
    groups: dict[str, Counter[int]] = {}
    for item in items:
        groups.setdefault(item.group or item.image, Counter())[item.label] += 1
    tested: set[str] = set()
    counts = Counter[int]()

    # by a hash of each key: a photo that comes, goes or gets another class moves hardly any other
    drawn = sorted(groups, key=lambda key: hashlib.sha256(f"test-{seed}-{key}".encode()).digest())
    for key in drawn:
        if all(counts[label] + n <= wanted[label] for label, n in groups[key].items()):
            tested.add(key)
            counts.update(groups[key])
    # groups that were too large: the smallest first, where a class is still without a test or they bring it closer
    for key in sorted(drawn, key=lambda key: groups[key].total()):
        classes = groups[key]
        leaves_one = all(counts[label] + n < sizes[label] for label, n in classes.items())
        error = sum(abs(counts[label] - wanted[label]) for label in classes)
        closer = sum(abs(counts[label] + n - wanted[label]) for label, n in classes.items()) < error
        if key not in tested and leaves_one and (closer or any(not counts[label] for label in classes)):
            tested.add(key)
            counts.update(classes)
    apart = [(item.group or item.image) in tested for item in items]
    return (
        [item for item, is_tested in zip(items, apart, strict=True) if not is_tested],
        [item for item, is_tested in zip(items, apart, strict=True) if is_tested],
    )


def _others(items: Sequence[Item], *picked: Sequence[Item]) -> list[Item]:
    """Return the images that are in none of the picks, nor in the group of one."""
    taken = {item.image for part in picked for item in part}
    groups = {item.group for part in picked for item in part if item.group}
    return [item for item in items if item.image not in taken and item.group not in groups]


def _usable(items: Sequence[Item], how: Sampling) -> list[Item]:
    if items and how.unusable.issuperset(item.image for item in items):
        raise UserError(
            f"data.skip_bad=true would leave out all of a part ({counted(len(items), 'image')}), first:"
            f" {items[0].image}; repair or"
            " restore them"
        )
    return [item for item in items if item.image not in how.unusable]


def _replaced(items: Sequence[Item], picked: Sequence[Item], how: Sampling, keep: int) -> list[Item]:
    """Return the picks with each unusable one replaced by another image of its class, as long as there are any.

    The other images of a class are tried in a random order that does not depend on which other images are unusable.

    Args:
        items: All items that could have been picked.
        picked: The picks.
        how: The draw.
        keep: Images of a class that stay unpicked, to test on.
    """
    if not how.refill or how.unusable.isdisjoint(item.image for item in picked):
        return list(picked)
    taken = {item.image for item in picked}
    spare: dict[int, list[Item]] = {}
    for label, group in by_label([item for item in items if item.image not in taken]).items():
        random.Random(f"refill-{how.seed}-{label}").shuffle(group)
        usable = [item for item in group if item.image not in how.unusable]
        spare[label] = usable[: max(0, len(usable) - keep)]
    return [
        spare[item.label].pop(0) if item.image in how.unusable and spare.get(item.label) else item for item in picked
    ]


def _validation(items: Sequence[Item], how: Sampling, rng: random.Random) -> list[Item]:
    if how.validation == "none":
        return []
    return pick(items, None if how.validation == "full" or how.shots is None else min(how.shots, 4), rng)


def _held_out(items: Sequence[Item], how: Sampling, keep: int) -> list[Item]:
    """Draw validation images with a generator of their own, so that the other picks stay the same. At least `keep`
    images of a class are left.
    """
    rest = by_label(items)
    count = 4 if how.shots is None else min(how.shots, 4)
    rng = random.Random(f"held-out-{how.seed}")
    return [item for group in rest.values() for item in rng.sample(group, min(count, max(0, len(group) - keep)))]


def _short(source: Source, train: Sequence[Item], how: Sampling) -> dict[str, int]:
    """Count images of names with fewer than `shots` per class; `coop` counts class by class, `clsrl` by name."""
    picked, shots, short_classes = Counter(item.label for item in train), how.shots or 0, dict[str, int]()
    there = {item.label for item in source.train}
    for name in dict.fromkeys(source.names):
        counts = [picked[label] for label, other in enumerate(source.names) if other == name and label in there]
        if sum(counts) < shots * len(counts) if how.sampler == "clsrl" else any(count < shots for count in counts):
            short_classes[name] = sum(counts)
    return short_classes


def too_few(short: Mapping[str, int], shots: int | str) -> str:
    """Return the line that names all classes with fewer training images than shots, with their numbers of images."""
    many = f"{counted(len(short), 'class')} {agree(len(short), 'has', 'have')}"
    return f"{many} fewer training images than shots={shots}: {', '.join(f'{k} {n}' for k, n in short.items())}"


def _check_rest(source: Source, shots: int | None) -> None:
    smallest = min(by_label(source.train).values(), key=len)
    if shots is None or len(smallest) <= shots:
        fewer = f"use shots={len(smallest) - 1} or fewer" if len(smallest) > 1 else "add images of this class"
        raise UserError(
            f"shots={shots or 'all'}, but class '{smallest[0].name}' has only {counted(len(smallest), 'image')} and"
            " at least one"
            f" must be left to test on, since the dataset has no test split; {fewer}, set a share of every class apart"
            " with test_share=0.2, or train nothing and test all of them with method=zeroshot"
        )


def halves(names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Split labels into base and new: the first ceil(C / 2), and the rest (CoCoOp, Zhou et al. 2022).

    >>> halves("abcde")
    ([0, 1, 2], [3, 4])
    """
    first = (len(names) + 1) // 2
    return list(range(first)), list(range(first, len(names)))
