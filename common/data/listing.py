"""Folders and text files of a dataset, read the same way on every machine: sorted, hidden entries left out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from common.data.place import Place
from common.types import Item


def subfolders(place: Place, folder: Path) -> list[str]:
    """Names of the folders in `folder`, in code point order (upper case first); links to folders count.

    Raises:
        UserError: It cannot be listed.
    """
    return _names(place, folder, os.DirEntry.is_dir)


def files(place: Place, folder: Path) -> list[str]:
    """Names of the files in `folder`, in code point order; links to files count.

    Raises:
        UserError: It cannot be listed.
    """
    return _names(place, folder, os.DirEntry.is_file)


def collect(place: Place, folder: Path, key: str, classes: Iterable[tuple[str, int, str]]) -> list[Item]:
    """The images of class folders, class by class.

    Args:
        place: For error messages.
        folder: Holds the class folders.
        key: Of `folder`.
        classes: Class folder, label and name.
    """
    items: list[Item] = []
    for subfolder, label, name in classes:
        start = f"{key}/{subfolder}/"
        items += [Item(start + file, label, name) for file in files(place, folder / subfolder)]
    return items


def text(place: Place, path: Path) -> str:
    """Content of a text file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: It is something else.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise place.error(f"{path} is not a text file in UTF-8 ({error})") from error


def lines(place: Place, path: Path) -> list[tuple[str, str]]:
    """The lines that are not blank, stripped, each after its place for error messages (`file, line 3`)."""
    stripped = (line.strip() for line in text(place, path).splitlines())
    return [(f"{path}, line {number}", line) for number, line in enumerate(stripped, start=1) if line]


def fields(place: Place, line: tuple[str, str], shape: str) -> list[str]:
    """A line of `lines` cut at blanks into as many fields as `shape` has; the last one keeps its blanks.

    Raises:
        UserError: It has fewer.
    """
    where, content = line
    count = len(shape.split())
    found = content.split(maxsplit=count - 1)
    if len(found) < count:
        raise place.error(f"{where}: '{content}' is not of the form '{shape}'")
    return found


def number(place: Place, where: str, value: str) -> int:
    """An integer in a text file.

    Raises:
        UserError: It is none.
    """
    try:
        return int(value)
    except ValueError:
        raise place.error(f"{where}: '{value}' is not a whole number") from None


def _names(place: Place, folder: Path, wanted: Callable[[os.DirEntry[str]], bool]) -> list[str]:
    # os.scandir knows files from folders without asking for each: ImageNet's 1.3 million take seconds.
    try:
        with os.scandir(folder) as entries:
            found = sorted(entry.name for entry in entries if entry.name[0] != "." and wanted(entry))
    except OSError as error:
        raise place.error(f"{folder} cannot be listed ({error.strerror})") from error
    check_text(place, folder, found)
    return found


def check_text(place: Place, folder: Path, names: Iterable[str]) -> None:
    """Refuse file names that are not UTF-8, as old archives have them: no question or result could write them.

    Raises:
        UserError: Names the first.
    """
    for name in names:
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise place.error(
                f"{folder} has the name {name!a}, which is not UTF-8; rename it (convmv -f latin1 -t utf8)"
            )
