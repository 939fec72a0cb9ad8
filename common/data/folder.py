"""Your own photos: one folder per class, or a CSV file (table.py).

Folders `train`, `test` and, if you like, `val` above the class folders (in a CSV the column `split`) are the parts.
Without them, all photos are one pool to pick from, and those that are not picked are for testing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from common.data.assemble import PARTS, Parts, assemble
from common.data.listing import check_text, files, subfolders
from common.data.place import Place
from common.data.table import Photo, photos_in_table
from common.parsing import normalize
from common.types import Item, Source

# With formats that Pillow may not decode: such a photo is reported later, not passed over.
PICTURES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
NAMES_OF_PARTS = frozenset((*PARTS, "valid", "validation", "training", "testing"))


def read(place: Place, *, csv: str | None = None) -> Source:
    """The photos; labels in the sorted order of class names.

    Args:
        place: The folder of photos, or the CSV file itself.
        csv: A CSV file in that folder.

    Raises:
        UserError: There are fewer than two classes, a class has no photo, or a row of the CSV is wrong.
    """
    path = place.need(csv or ".")
    base = place.folder.parent if place.folder.is_file() else place.folder
    photos = photos_in_table(place, path, base) if path.is_file() else list(_photos_in_folders(place, path))
    names = sorted({photo.name for photo in photos})
    if len(names) < 2:
        raise place.error(f"{path} has {len(names)} classes; a task needs two or more")
    _check_names(place, names)
    labels = {name: label for label, name in enumerate(names)}
    parts: dict[str, list[Item]] = {part: [] for part in PARTS}
    for photo in photos:
        parts[photo.part].append(Item(place.key(photo.path), labels[photo.name], photo.name))
    origin = "own split" if parts["test"] else "own images"
    return assemble(place, names, Parts(**parts), origin, {place.name: base})


def _check_names(place: Place, names: Sequence[str]) -> None:
    """Names that one answer could mean two of, or that a list could not hold."""
    known: dict[str, str] = {}
    for name in names:
        if known.setdefault(normalize(name), name) != name:
            raise place.error(f"classes '{known[normalize(name)]}' and '{name}' are one answer; give them other names")
        if "," in name:
            raise place.error(f"class '{name}' has a comma, which separates the names in a question; rename it")


def _photos_in_folders(place: Place, folder: Path) -> Iterator[Photo]:
    found = subfolders(place, folder)
    if {"train", "test"} <= set(found) and (others := sorted(set(found) - set(PARTS))):
        raise place.error(
            f"{folder} has the folders train and test, but also {others[0]}; move it away, or give one folder per class"
        )
    if {"train", "test"} <= set(found):
        for part in found:
            yield from _photos_of_part(place, folder, f"{part}/", part)
    elif {name.lower() for name in found} <= NAMES_OF_PARTS:
        raise place.error(
            f"{folder} has the folders {', '.join(found) or '(none)'}; it needs one folder per class, or the folders"
            " train, test and, if you like, val with one folder per class in each"
        )
    else:
        yield from _photos_of_part(place, folder, "", "train")


def _photos_of_part(place: Place, folder: Path, prefix: str, part: str) -> Iterator[Photo]:
    here = folder / prefix
    if stray := _pictures(files(place, here)):
        raise place.error(f"{here / stray[0]} is in no class folder ({len(stray)} such photos)")
    for name in subfolders(place, here):
        paths = _pictures_below(place, here / name)
        if not paths:
            raise place.error(f"class folder {here / name} has no photo ({', '.join(PICTURES)})")
        yield from (Photo(f"{prefix}{name}/{path}", name, part) for path in paths)


def _pictures_below(place: Place, folder: Path) -> list[str]:
    found = []
    for here, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [Path(here, name).relative_to(folder).as_posix() for name in _pictures(names)]
    check_text(place, folder, found)
    return sorted(found)


def _pictures(names: Sequence[str]) -> list[str]:
    return [name for name in names if name[0] != "." and PurePath(name).suffix.lower() in PICTURES]
