"""The split files of CoOp (K. Zhou et al. 2022): one JSON object with `train`, `val` and `test`, each a list of
`[path, label, class name]`, paths relative to the dataset's image folder.

The order of the entries decides which images a seed picks, so it is kept.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.data.assemble import PARTS, Parts, assemble, names_by_label
from common.data.listing import text
from common.data.location import Location
from common.plugins import check_call, locate
from common.types import Item, Source, UserError

FALLBACK = "data.reader.fallback._target_"


def read(
    location: Location,
    *,
    split: str,
    images: str = ".",
    fallback: Mapping[str, Any] | None = None,
    fallback_seed: int = 1,
) -> Source:
    """A dataset with a split file, or with a split of our own where `location` allows one.

    Args:
        location: Of the dataset.
        split: The split file, in the dataset's folder.
        images: The folder that its paths are relative to, in the dataset's folder.
        fallback: `_target_` and keyword arguments of the function that splits without it (common/data/fallback.py).
        fallback_seed: Of that split; the run's own seed does not change it.

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
    """The content of a split file; class names as they stand there.

    Raises:
        UserError: It is not such a file; names the first entry at fault.
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
    """Write a split file that `parse` reads back, to the byte as CoOp writes it."""
    start = location.key(prefix(images))
    content = {part: [_row(item, start) for item in getattr(parts, part)] for part in PARTS}
    path.write_text(json.dumps(content, indent=4), encoding="utf-8")


def prefix(images: str) -> str:
    """What a folder adds before paths that are relative to it.

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
