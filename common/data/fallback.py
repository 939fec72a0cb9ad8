"""Splits of our own where a split file is missing, by the rules that CoOp's code made its split files with.

They hold other images than the published split files, because those were made from an unsorted listing and an unknown
state of the generator. Here listings are sorted and the generator has a seed of its own, so that the same files give
the same split everywhere. `annotations.py` has the datasets whose labels stand in files.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from common.counted import counted
from common.data.assemble import Parts
from common.data.listing import collect, subfolders
from common.data.location import Location
from common.data.sampling import by_label
from common.types import Item

TRAIN_SHARE, VAL_SHARE = 0.5, 0.2  # of a class; the rest is for testing (CoOp)


def folders(
    location: Location,
    images: str,
    rng: random.Random,
    *,
    ignored: Sequence[str] = (),
    renames: Mapping[str, str] | None = None,
) -> Parts:
    """Split the images of class folders.

    Args:
        location: Of the dataset.
        images: The folder of the class folders, in the dataset's folder.
        rng: Shuffles the classes one after the other.
        ignored: Folders that are no class.
        renames: Class name by folder name, where they differ.

    Raises:
        UserError: A class has fewer images than a split needs.
    """
    folder = location.need(images)
    renames = renames or {}
    categories = [name for name in subfolders(location, folder) if name not in ignored]
    classes = [(name, label, renames.get(name, name)) for label, name in enumerate(categories)]
    return split_classes(location, collect(location, folder, location.key(images), classes), rng)


def split_classes(location: Location, items: Iterable[Item], rng: random.Random) -> Parts:
    """Half of every class for training, a fifth for validation, the rest for testing, rounded half to even.

    Raises:
        UserError: A class is too small to give every part an image.
    """
    train: list[Item] = []
    val: list[Item] = []
    test: list[Item] = []
    for group in by_label(list(items)).values():
        trained, validated = round(len(group) * TRAIN_SHARE), round(len(group) * VAL_SHARE)
        _check(location, group, min(trained, validated, len(group) - trained - validated), "train, val and test")
        rng.shuffle(group)
        train += group[:trained]
        val += group[trained : trained + validated]
        test += group[trained + validated :]
    return Parts(train, val, test)


def split_trainval(
    location: Location, items: Iterable[Item], rng: random.Random, share: float = VAL_SHARE
) -> tuple[list[Item], list[Item]]:
    """Training and validation images: `share` of every class for validation, rounded half to even.

    Raises:
        UserError: A class is too small to give both parts an image.
    """
    train: list[Item] = []
    val: list[Item] = []
    for group in by_label(list(items)).values():
        validated = round(len(group) * share)
        _check(location, group, min(validated, len(group) - validated), "train and val")
        rng.shuffle(group)
        val += group[:validated]
        train += group[validated:]
    return train, val


def _check(location: Location, group: Sequence[Item], smallest: int, parts: str) -> None:
    if smallest == 0:
        raise location.error(
            f"class '{group[0].name}' has {counted(len(group), 'image')}, too few to make {parts} of them; use the"
            " split file"
        )
