"""How a folder of photos is laid out: one folder per class, or such folders below those of the parts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from common.data.listing import Listing, scan
from common.data.location import Location

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
    """The class folders of one part: they lie in `folder` (inside the photos' folder; "" or with a `/` at its end)."""

    folder: str
    name: str


def parts_by_name(names: Iterable[str]) -> dict[str, str]:
    """Those of the names that mean a part, with `train`, `val` or `test`.

    `eval` is the test part, or `val` beside another test part.

    >>> parts_by_name(["Training_Set", "dev", "test-set", "testament", "seg_test", "training shoes"])
    {'Training_Set': 'train', 'dev': 'val', 'test-set': 'test', 'seg_test': 'test'}
    >>> parts_by_name(["train", "eval"]), parts_by_name(["eval", "TEST"])
    ({'train': 'train', 'eval': 'test'}, {'eval': 'val', 'TEST': 'test'})
    """
    parts = {name: str(match.lastgroup) for name in names if (match := PART.fullmatch(name))}
    rest = "val" if "test" in parts.values() else "test"
    return {name: rest if part == "eval" else part for name, part in parts.items()}


def pictures(names: Sequence[str]) -> list[str]:
    """The files that are pictures by their suffix."""
    return [name for name in names if PurePath(name).suffix.lower() in PICTURES]


def parts_of(location: Location, folder: Path) -> list[Part]:
    """The parts that a folder of photos has; one without a name for it is `train`, and its classes lie in the folder.

    Raises:
        UserError: The class folders seem to lie elsewhere; names the path that was meant.
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
    """Below a part, archives often have it once more: `training_set/training_set/cat`."""
    inside = f"{name}/"
    while True:
        listing = scan(location, folder / inside)
        again = parts_by_name([name, *listing.folders])
        if len(listing.folders) != 1 or pictures(listing.files) or again.get(listing.folders[0]) != again[name]:
            return inside
        inside += f"{listing.folders[0]}/"


def _no_split(folder: Path, named: dict[str, str]) -> str:
    start = f"{folder} has the folders {', '.join(named) or '(none)'}"
    if not named:
        return (
            f"{start}; it needs one folder per class, or such folders in the folders train, test and, if you like, val"
        )
    one = next((name for name, part in named.items() if part == "train"), next(iter(named)))
    missing = [part for part in ("train", "test") if part not in named.values()]
    rename = f"; call one of them {missing[0]}, or" if len(named) > 1 else ";"
    return (
        f"{start}, but none to {' and none to '.join(missing)} on{rename} give data.folder={folder / one}, of which"
        " what is not picked is tested"
    )


def _refuse_wrapped(location: Location, folder: Path, listing: Listing) -> None:
    """A folder around the class folders, as archives bring it: not guessed, since it may as well be the only class."""
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
