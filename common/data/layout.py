"""Recognise how a folder of photos is laid out, and find the images of a table in it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from urllib.parse import unquote

from common.data.listing import (
    URL,
    Listing,
    Location,
    composed,
    invisible,
    litter_reason,
    on_disk,
    scan,
    visible,
)

PICTURES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png"),
    *(".ppm", ".tif", ".tiff", ".webp"),
)
PART = re.compile(
    r"(?:(?:seg|images?|data|dataset)[ _-])?"
    r"(?:(?P<train>train|training)|(?P<test>tests?|testing)|(?P<val>val|valid|validation|dev)|(?P<eval>eval|evaluation))"
    r"(?:[ _-]?(?:set|data|images?|split))?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Part:
    """A part and its class folders, which lie in `folder` (relative to the photos; "" or with a `/` at its end)."""

    folder: str
    name: str


def parts_by_name(names: Iterable[str]) -> dict[str, str]:
    """Return the names that mean a part, each with `train`, `val` or `test`; other names are left out.

    `eval` means test, or `val` beside another test part.

    >>> parts_by_name(["Training_Set", "dev", "test-set", "testament", "seg_test", "training shoes"])
    {'Training_Set': 'train', 'dev': 'val', 'test-set': 'test', 'seg_test': 'test'}
    >>> parts_by_name(["train", "eval"]), parts_by_name(["eval", "TEST"])
    ({'train': 'train', 'eval': 'test'}, {'eval': 'val', 'TEST': 'test'})
    """
    parts = {name: str(match.lastgroup) for name in names if (match := PART.fullmatch(name))}
    rest = "val" if "test" in parts.values() else "test"
    return {name: rest if part == "eval" else part for name, part in parts.items()}


def pictures(names: Sequence[str]) -> list[str]:
    """Return the files with the suffix of an image."""
    return [name for name in names if PurePath(name).suffix.lower() in PICTURES]


def parts_of(location: Location, folder: Path) -> list[Part]:
    """Find the parts of a folder of photos; without folders for parts, all of it is `train`.

    Raises:
        UserError: The class folders seem to lie elsewhere; names the path that was probably meant.
    """
    listing = scan(location, folder)
    named = parts_by_name(listing.folders)
    if {"train", "test"} <= set(named.values()):
        return _split(location, folder, listing, named)
    if len(named) == len(listing.folders):
        raise location.error(_no_split(folder, named))
    _refuse_wrapped(location, folder, listing)
    _refuse_split_below(location, folder, listing.folders)
    return [Part("", "train")]


def _split(location: Location, folder: Path, listing: Listing, named: dict[str, str]) -> list[Part]:
    if others := [name for name in listing.folders if name not in named]:
        given = " and ".join(name for part in ("train", "test") for name, meant in named.items() if meant == part)
        raise location.error(
            f"{folder} has the folders {given}, but also {others[0]}; move it away, or give one folder per class"
        )
    for part in ("train", "val", "test"):
        if len(same := [name for name, meant in named.items() if meant == part]) > 1:
            raise location.error(
                f"{folder} has the folders {same[0]} and {same[1]}, which both mean {part}; move one away"
            )
    parts = [Part(_innermost(location, folder, name), part) for name, part in named.items()]
    if any(part.folder != f"{part.name}/" for part in parts):
        location.notes.append(", ".join(f"{part.folder} is read as {part.name}" for part in parts))
    return parts


def _innermost(location: Location, folder: Path, name: str) -> str:
    """Return the folder of a part; archives often repeat it inside itself: `training_set/training_set/cat`."""
    inside = f"{name}/"
    while True:
        listing = scan(location, folder / inside)
        again = parts_by_name([name, *listing.folders])
        if len(listing.folders) != 1 or pictures(listing.files) or again.get(listing.folders[0]) != again[name]:
            return inside
        inside += f"{listing.folders[0]}/"


def _no_split(folder: Path, named: dict[str, str]) -> str:
    if not named:
        return (
            f"{folder} holds no folders; it needs one folder per class, or such folders in the folders train, test and,"
            " if you like, val"
        )
    start = f"{folder} has the folders {', '.join(named)}"
    one = next((name for name, part in named.items() if part == "train"), next(iter(named)))
    missing = [part for part in ("train", "test") if part not in named.values()]
    rename = f"; call one of them {missing[0]}, or" if len(named) > 1 else ";"
    return (
        f"{start}, but none to {' and none to '.join(missing)} on{rename} give data.folder={folder / one}, of which"
        " what is not picked is tested"
    )


def _refuse_wrapped(location: Location, folder: Path, listing: Listing) -> None:
    """Refuse a folder around the class folders, as archives have it: not guessed, since it may be the only class."""
    inside, there = listing, folder
    while len(inside.folders) == 1 and not pictures(inside.files):
        there /= inside.folders[0]
        inside = scan(location, there)
    if there != folder and len(inside.folders) > 1:
        found = "the parts" if _is_split(inside.folders) else "the classes"
        raise location.error(
            f"{folder} holds one folder only, {listing.folders[0]}; {found} seem to be {_some(inside.folders)}:"
            f" give data.folder={there}"
        )


def _refuse_split_below(location: Location, folder: Path, names: Sequence[str]) -> None:
    below = [name for name in names if _is_split(scan(location, folder / name).folders)]
    if len(below) == 1:
        raise location.error(
            f"{folder / below[0]} has folders to train and to test on; if these are the parts, give"
            f" data.folder={folder / below[0]}"
        )
    if below:
        raise location.error(
            f"{folder} has parts below the classes, as in {folder / below[0]}; move them above (train/<class>,"
            " test/<class>), or give a CSV file with the columns path,label,split"
        )


def _is_split(names: Sequence[str]) -> bool:
    return {"train", "test"} <= set(parts_by_name(names).values())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# Label Studio's addresses of an upload (its name begins with eight digits added by Label Studio) and of a local file.
UPLOAD = re.compile(r"(?:https?://[^/]+)?/data/(?:(?:upload/\d+/)((?:[\da-f]{8}-)?(.+))|local-files/\?d=(.+))")


def spelt(path: str) -> list[str]:
    """Return the paths that a table's path may mean, the likeliest first.

    >>> spelt("a%20b.jpg"), spelt("a\\\\b.jpg")
    (['a%20b.jpg', 'a b.jpg'], ['a\\\\b.jpg', 'a/b.jpg'])
    >>> spelt("/data/local-files/?d=a%2520b.jpg"), spelt("/data/upload/7/0a1b2c3d-b.jpg")
    (['a%20b.jpg', 'a%2520b.jpg'], ['0a1b2c3d-b.jpg', 'b.jpg'])
    """
    if upload := UPLOAD.fullmatch(path):  # Label Studio encodes its addresses
        return list(dict.fromkeys(way for name in upload.groups() if name for way in (unquote(name), name)))
    return list(dict.fromkeys(way for name in (path, path.replace("\\", "/")) for way in (name, unquote(name))))


class Finder:
    """Finds the images of a table: at the given path, or by their names in the folders below the table."""

    def __init__(self, location: Location, table: Path) -> None:
        """
        Args:
            location: For errors, and for a note on what was found elsewhere.
            table: The table. Paths are relative to its folder; if its name means a part, that part is preferred.
        """
        self.location, self.table, self.folder = location, table, table.parent
        self.elsewhere: Counter[str] = Counter()  # number of images found by name, by folder
        self.unknown: list[str] = []  # names without a suffix for which no image was found
        self.known = 0
        self._index: dict[str, list[str]] | None = None

    def __call__(self, where: str, path: str) -> str:
        """Return an image's path, relative to the table's folder; as it is written if the image does not exist.

        Raises:
            UserError: It is a URL, has an invisible character, or could be two images.
        """
        upload = UPLOAD.fullmatch(path)
        if URL.match(path) and not upload:
            raise self.location.error(
                f"{where}: '{path}' is a URL, and URLs are not read; download the pictures, and give their paths"
            )
        ways = spelt(path)
        for way in ways:
            if os.path.exists(on_disk(self.folder / way)):
                self.known += 1
                return way
        if character := invisible(path):
            raise self.location.error(
                f"{where}: path '{visible(path)}' has the invisible character {character}; remove it"
            )
        for way in ways:
            if found := self._near(where, way):
                self.known += 1
                return found
        if upload:
            raise self.location.error(
                f"{where}: {path} is an address inside Label Studio, and {ways[-1]} is not in {self.folder}; copy"
                " the pictures there"
            )
        if not pictures([path]):
            self.unknown.append(path)
        return path.replace("\\", "/")  # as written on Windows

    def conclude(self) -> None:
        """Add a note on what was found elsewhere.

        Raises:
            UserError: The table has names without suffixes, and no image was found for any of them.
        """
        if self.unknown and not self.known:
            raise self.location.error(
                f"{self.table}: there is no picture called {self.unknown[0]} in {self.folder}, nor one of the"
                f" {len(self.unknown)} others; put the pictures there, or correct the column of paths"
            )
        if self.elsewhere:
            told = ", ".join(f"{count} in {folder}" for folder, count in sorted(self.elsewhere.items()))
            self.location.notes.append(f"{self.table.name}: pictures were found by their names, {told}")

    def _near(self, where: str, way: str) -> str:
        """Find an image below the table's folder by its name, or by its path without a suffix; empty if there is none.

        Raises:
            UserError: There are two, and the table's name means no part or the part of both.
        """
        hits = self.index.get(composed(way), [])
        if part := parts_by_name([self.table.stem]).get(self.table.stem):
            tops = parts_by_name({hit.split("/")[0] for hit in hits})
            hits = [hit for hit in hits if tops.get(hit.split("/")[0]) == part] or hits
        if len(hits) > 1:
            raise self.location.error(f"{where}: '{way}' could be {hits[0]} or {hits[1]}; give its path")
        if not hits:
            return ""
        folder = hits[0].rpartition("/")[0]
        if folder != way.rpartition("/")[0]:
            self.elsewhere[f"{folder}/"] += 1
        return hits[0]

    @property
    def index(self) -> dict[str, list[str]]:
        """The images below the table's folder, by their names and paths, with and without their suffixes."""
        if self._index is None:
            self._index = {}
            for here, folders, names in os.walk(on_disk(self.folder)):
                folders[:] = sorted(name for name in folders if not litter_reason(name))
                inside = Path(here).relative_to(on_disk(self.folder)).as_posix()
                for name in pictures([name for name in names if not litter_reason(name)]):
                    path = name if inside == "." else f"{inside}/{name}"
                    for key in dict.fromkeys((name, Path(name).stem, path.rpartition(".")[0])):
                        self._index.setdefault(composed(key), []).append(path)
        return self._index
