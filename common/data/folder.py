"""Read your own photos: one folder per class, or a table (table.py), which may lie in the folder; zipped or not."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from common.counted import counted
from common.data import wordnet
from common.data.archive import unpacked
from common.data.groups import WAYS, grouped
from common.data.layout import PICTURES, parts_of, pictures
from common.data.listing import Location, litter_summary, litter_worded, on_disk, scan
from common.data.names import objections, remarks
from common.data.source import PARTS, Parts, assemble
from common.data.table import (
    Photo,
    corrections_in,
    in_place_of_folders,
    metadata,
    others,
    photos_in_table,
    photos_in_tables,
    usable,
)
from common.parsing import normalize
from common.types import Item, Source, UserError

CORRECTIONS = "corrections"  # in front of the keys of photos that tables of corrections add; with _2 for the second

# Folders `train`, `test` and optionally `val` above the class folders (in a CSV file the column `split`) are the parts.
# Without them, all photos are one pool to pick from, and those that are not picked are for testing.


def read(
    location: Location,
    *,
    csv: str | None = None,
    corrections: str | Sequence[str] | None = None,
    group_by: str | None = None,
) -> Source:
    """Read the photos; labels follow the sorted class names, and WordNet ids are replaced by words.

    Args:
        location: The folder of photos, a zip file of it, or the table itself.
        csv: Name of a table in that folder.
        corrections: Paths of tables with the right classes of some photos, and further photos; a later one counts more.
        group_by: Which photos stay on one side of every split: `burst`, `folder`, or the name of a column of the table.

    Raises:
        UserError: There are fewer than two classes, a class has no photo or a name that cannot be an answer, a row of a
            table is wrong, or there is nothing to group by.
    """
    location = replace(location, folder=unpacked(location, location.folder))
    path = location.need(csv or ".")
    is_table = on_disk(path).is_file()
    base = location.folder.parent if on_disk(location.folder).is_file() else location.folder
    column = None if group_by in (None, *WAYS) else group_by
    photos = photos_in_table(location, path, base, column) if is_table else _photos_in(location, path, base, column)
    if group_by is not None:
        photos = grouped(location, photos, group_by, base)
    tables = [] if corrections is None else [corrections] if isinstance(corrections, str) else corrections
    photos, added, folders = _corrected(location, photos, tables, base)
    folders[location.name] = base
    names = sorted({photo.name for photo in (*photos, *added.values())})
    _refuse_few(location, path, names)
    # labels are counted before WordNet ids become words, so that they do not depend on the words
    labels = {name: label for label, name in enumerate(names)}
    names = _in_words(location, names)
    for objection in objections(names):
        raise location.error(objection)
    location.notes.extend(remarks(names))
    parts: dict[str, list[Item]] = {part: [] for part in PARTS}
    for photo in photos:
        label = labels[photo.name]
        parts[photo.part].append(Item(location.key(photo.path), label, names[label], photo.group))
    for key, photo in added.items():
        label = labels[photo.name]
        parts[photo.part].append(Item(key, label, names[label]))
    origin = "own split" if parts["test"] else "own images"
    source = assemble(location, names, Parts(**parts), origin, folders)
    return replace(source, added=frozenset(added))


def is_added(key: str, dataset: str) -> bool:
    """Return whether the photo of this key came with a table of corrections.

    >>> is_added("corrections_2/new/cat.jpg", "pets"), is_added("pets/corrections/cat.jpg", "pets")
    (True, False)
    """
    beginning = key.partition("/")[0]
    return beginning != dataset and re.fullmatch(rf"{CORRECTIONS}(_\d+)?", beginning) is not None


def _corrected(
    location: Location, photos: Sequence[Photo], tables: Sequence[str], base: Path
) -> tuple[list[Photo], dict[str, Photo], dict[str, Path]]:
    """Apply tables of corrections, a later one over an earlier one.

    Returns:
        The dataset's photos with their right classes; the photos that are added, by their keys; and the folders that
        these lie in, by the beginnings of the keys.
    """
    added: dict[str, Photo] = {}
    folders: dict[str, Path] = {}
    for number, name in enumerate(tables, start=1):
        table = Path(name).expanduser().absolute()
        corrections, new = corrections_in(location, photos, table, base)
        beginning = CORRECTIONS if number == 1 else f"{CORRECTIONS}_{number}"
        folders[beginning] = table.parent
        added |= {f"{beginning}/{photo.path}": photo for photo in new}
        out = sum(not label for label in corrections.values())
        location.notes.append(
            f"{table.name}: {counted(len(corrections) - out, 'photo')} corrected, {out} left out, {len(new)} added to"
            " the training"
        )
        known = {photo.name for photo in photos}
        if strange := sorted({*corrections.values(), *(photo.name for photo in new)} - known - {""}):
            near = {name: get_close_matches(name, known, 1) for name in strange}
            named = [f"{name} (did you mean {near[name][0]}?)" if near[name] else name for name in strange]
            location.notes.append(f"warning: {table.name} has classes that the photos have not: {', '.join(named)}")
        photos = [replace(photo, name=corrections.get(photo.path, photo.name)) for photo in photos]
    return [photo for photo in photos if photo.name], added, folders


def _refuse_few(location: Location, path: Path, names: Collection[str]) -> None:
    if len(names) < 2:
        raise location.error(f"{path} has {counted(len(names), 'class')}; a task needs two or more")


def _photos_in(location: Location, folder: Path, base: Path, group: str | None) -> list[Photo]:
    """Return the photos of a folder: by a table with a usual name, else by class folders, else by any table.

    `group`: name of the column with the groups of the photos.

    Raises:
        UserError: There are no class folders, and no table or several; names what is there.
    """
    if described := metadata(location, folder):
        return photos_in_tables(location, folder, described, base, group)
    aside = replace(location, passed_over={}, notes=[])  # its notes count only if the folders can be read
    try:
        photos = list(_photos_in_folders(aside, folder))
        _refuse_few(location, folder, {photo.name for photo in photos})
    except UserError as error:
        if chosen := in_place_of_folders(location, folder):
            return photos_in_tables(location, folder, chosen, base, group)
        raise UserError(f"{error}{others(location, folder)}") from error
    location.passed_over.update(aside.passed_over)
    location.notes.extend(aside.notes)
    if tables := usable(location, folder):
        location.notes.append(
            f"warning: {tables[0]} has labels, too; the folders were read as classes, and data.folder=<the file>"
            " reads it instead"
        )
    return photos


def _in_words(location: Location, names: Sequence[str]) -> list[str]:
    """Return the names, with WordNet ids replaced by words.

    Raises:
        UserError: A word is already the name of another class.
    """
    words = wordnet.named(filter(wordnet.WNID.fullmatch, names))
    known = {normalize(name): name for name in names}
    for wnid, word in words.items():
        if other := known.get(normalize(word)):
            raise location.error(f"classes '{other}' and '{wnid}', which means {word}, are one answer; unite them")
    if words:
        first = min(words)
        location.notes.append(f"WordNet ids are read as words ({len(words)}): {first} is '{words[first]}'")
    return [words.get(name, name) for name in names]


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
    """Return the images in a class folder and in its subfolders, as paths inside it.

    Links are followed, except to a folder in or around one that is read already: these could form a circle.
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
    """Tell whether a folder lies in or around one of those that are read."""
    return any(os.path.commonpath((path, other)) in (path, other) for other in seen)


def _pass_over(location: Location, folder: Path, names: Sequence[str]) -> None:
    for name in set(names).difference(pictures(names)):
        location.pass_over(folder / name, "unknown suffix")


def _instead(location: Location, folder: Path) -> str:
    """Return a text about the files that a class folder has instead of photos."""
    reasons = [why for path, why in location.passed_over.items() if path.startswith(f"{folder}{os.sep}")]
    return f"; passed over: {litter_worded(litter_summary(reasons))}" if reasons else ""
