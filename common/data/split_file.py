"""Read and write CoOp's split files, and make splits of our own by CoOp's rules where such a file is missing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.counted import counted
from common.data.listing import Location, collect, subfolders, text
from common.data.sampling import by_label
from common.data.source import PARTS, Parts, assemble, names_by_label
from common.plugins import check_call, locate
from common.types import Item, Source, UserError

# CoOp's split files (K. Zhou et al. 2022): one JSON object with `train`, `val` and `test`, each a list of
# `[path, label, class name]`, paths relative to the dataset's image folder.
#
# The order of the entries is kept, since it decides which images a seed picks.


FALLBACK = "data.reader.fallback._target_"


def read(
    location: Location,
    *,
    split: str,
    images: str = ".",
    fallback: Mapping[str, Any] | None = None,
    fallback_seed: int = 1,
) -> Source:
    """Read a dataset with a split file, or split it here if the file is missing and `location` allows that.

    Args:
        location: Location of the dataset.
        split: The split file, in the dataset's folder.
        images: The folder that its paths are relative to, in the dataset's folder.
        fallback: `_target_` and keyword arguments of the function that makes a split without the file.
        fallback_seed: Seed of that split; it does not depend on the seed of the run.

    Raises:
        UserError: A file or folder is missing, or the split file is damaged.
    """
    location.need(images)
    path = location.folder / split
    if path.is_file():
        parts = parse(location, path, images)
        return assemble(location, names_by_label(location, parts, str(path)), parts, "CoOp split")
    if fallback is None:
        raise UserError(f"data={location.name}: {path} does not exist; {location.section} says what belongs there")
    if not location.allow_fallback_split:
        raise UserError(
            f"data={location.name}: {path} does not exist; {location.section} says what belongs there, and"
            " data.allow_fallback_split=true makes a split of our own, with other images than published results have"
        )
    parts = _fall_back(location, images, fallback, random.Random(fallback_seed))
    return assemble(
        location, names_by_label(location, parts, f"{location.folder} without {split}"), parts, "fallback split"
    )


def parse(location: Location, path: Path, images: str = ".") -> Parts:
    """Read a split file; class names as they are written there.

    Raises:
        UserError: It is not a split file; names the first entry at fault.
    """
    try:
        content = json.loads(text(location, path))
    except json.JSONDecodeError as error:
        raise location.error(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict) or any(not isinstance(content.get(part), list) for part in PARTS):
        raise location.error(f"{path} is not a split file: it needs the lists train, val and test")
    start = prefix(images)
    train, val, test = (
        [_item(location, f"{path}: {part}[{number}]", start, row) for number, row in enumerate(content[part])]
        for part in PARTS
    )
    return Parts(train, val, test)


def save_split(path: Path, location: Location, parts: Parts, images: str = ".") -> None:
    """Write a split file that `parse` reads back, byte for byte as CoOp writes it."""
    start = location.key(prefix(images))
    content = {part: [_row(item, start) for item in getattr(parts, part)] for part in PARTS}
    path.write_text(json.dumps(content, indent=4), encoding="utf-8")


def prefix(images: str) -> str:
    """Return the prefix of keys for paths that are relative to a folder.

    >>> prefix("images"), prefix(".")
    ('images/', '')
    """
    return "" if images == "." else f"{images}/"


def _item(location: Location, where: str, start: str, row: object) -> Item:
    match row:
        case [str(path), int(label), str(name)] if not isinstance(label, bool):
            if path.startswith("/") or ".." in path.split("/"):
                raise location.error(f"{where}: '{path}' is not relative to the image folder")
            return Item(location.key(start + path), label, name)
    raise location.error(f"{where} is {json.dumps(row)}, not of the form [path, label, class name]")


def _row(item: Item, start: str) -> Sequence[object]:
    return [item.image.removeprefix(start), item.label, item.name]


def _fall_back(location: Location, images: str, fallback: Mapping[str, Any], rng: random.Random) -> Parts:
    if "_target_" not in fallback:
        raise UserError(f"{FALLBACK} is missing; give the dotted path of a function")
    arguments = {key: value for key, value in fallback.items() if key != "_target_"}
    check_call(fallback["_target_"], FALLBACK, arguments, given=3)
    return locate(fallback["_target_"], FALLBACK)(location, images, rng, **arguments)


# Splits where a split file is missing, by the rules of CoOp's code.
#
# They hold other images than the published split files, which were made from an unsorted listing and an unknown state
# of the generator. Here listings are sorted and the generator has a seed of its own, so that the same files give the
# same split everywhere. `annotations.py` has the datasets whose labels are in annotation files.

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
        location: Location of the dataset.
        images: The folder of the class folders, in the dataset's folder.
        rng: Generator that shuffles the classes one after the other.
        ignored: Folders that are not classes.
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
    """Split every class: half for training, a fifth for validation, the rest for testing, rounded half to even.

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
    """Split into training and validation: `share` of every class for validation, rounded half to even.

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
