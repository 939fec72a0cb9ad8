"""Your own photos: one folder per class, or a CSV file (table.py).

Folders `train`, `test` and, if you like, `val` above the class folders (in a CSV the column `split`) are the parts.
Without them, all photos are one pool to pick from, and those that are not picked are for testing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.counted import counted
from common.data.assemble import PARTS, Parts, assemble
from common.data.layout import PICTURES, parts_of, pictures
from common.data.listing import scan
from common.data.litter import summary, worded
from common.data.location import Location
from common.data.spelling import on_disk
from common.data.table import Photo, photos_in_table
from common.parsing import normalize
from common.types import Item, Source


def read(location: Location, *, csv: str | None = None) -> Source:
    """The photos; labels in the sorted order of class names.

    Args:
        location: The folder of photos, or the CSV file itself.
        csv: A CSV file in that folder.

    Raises:
        UserError: There are fewer than two classes, a class has no photo, or a row of the CSV is wrong.
    """
    path = location.need(csv or ".")
    base = location.folder.parent if on_disk(location.folder).is_file() else location.folder
    is_table = on_disk(path).is_file()
    photos = photos_in_table(location, path, base) if is_table else list(_photos_in_folders(location, path))
    names = sorted({photo.name for photo in photos})
    if len(names) < 2:
        raise location.error(f"{path} has {counted(len(names), 'class')}; a task needs two or more")
    _check_names(location, names)
    labels = {name: label for label, name in enumerate(names)}
    parts: dict[str, list[Item]] = {part: [] for part in PARTS}
    for photo in photos:
        parts[photo.part].append(Item(location.key(photo.path), labels[photo.name], photo.name))
    origin = "own split" if parts["test"] else "own images"
    return assemble(location, names, Parts(**parts), origin, {location.name: base})


def _check_names(location: Location, names: Sequence[str]) -> None:
    """Names that one answer could mean two of, or that a list could not hold."""
    known: dict[str, str] = {}
    for name in names:
        if known.setdefault(normalize(name), name) != name:
            raise location.error(
                f"classes '{known[normalize(name)]}' and '{name}' are one answer; give them other names"
            )
        if not normalize(name):
            raise location.error(f"class '{name}' has no letter; rename it")
        if "," in name:
            raise location.error(f"class '{name}' has a comma, which separates the names in a question; rename it")


def _photos_in_folders(location: Location, folder: Path) -> Iterator[Photo]:
    for part in parts_of(location, folder):
        here = folder / part.folder
        listing = scan(location, here)
        if stray := pictures(listing.files):
            raise location.error(f"{here / stray[0]} is in no class folder ({counted(len(stray), 'such photo')})")
        _pass_over(location, here, listing.files)
        for name in listing.folders:
            paths = _pictures_below(location, folder, here / name)
            if not paths:
                raise location.error(
                    f"class folder {here / name} has no photo ({', '.join(PICTURES)}){_instead(location, here / name)}"
                )
            yield from (Photo(f"{part.folder}{name}/{path}", name, part.name) for path in paths)


def _pictures_below(location: Location, base: Path, folder: Path) -> list[str]:
    """The pictures in a class folder and in its folders, by their paths in it.

    Links are followed, but not to a folder in or around one that is read: such a link could lead round in a circle.
    """
    paths: list[str] = []
    waiting, seen = [""], {os.path.realpath(on_disk(base)), os.path.realpath(on_disk(folder))}
    while waiting:
        inside = waiting.pop()
        listing = scan(location, folder / inside)
        paths += [inside + name for name in pictures(listing.files)]
        _pass_over(location, folder / inside, listing.files)
        for name in listing.folders:
            way = on_disk(folder / inside / name)
            if os.path.islink(way) and _overlaps(seen, os.path.realpath(way)):
                location.pass_over(folder / inside / name, "overlapping link")
            else:
                seen.add(os.path.realpath(way))
                waiting.append(f"{inside}{name}/")
    return sorted(paths)


def _overlaps(seen: set[str], path: str) -> bool:
    """Whether a folder lies in or around one of those that are read."""
    return any(os.path.commonpath((path, other)) in (path, other) for other in seen)


def _pass_over(location: Location, folder: Path, names: Sequence[str]) -> None:
    for name in set(names).difference(pictures(names)):
        location.pass_over(folder / name, "unknown suffix")


def _instead(location: Location, folder: Path) -> str:
    """What a class folder has in place of photos."""
    reasons = [why for path, why in location.passed_over.items() if path.startswith(f"{folder}{os.sep}")]
    return f"; passed over: {worded(summary(reasons))}" if reasons else ""
