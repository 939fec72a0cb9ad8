"""Folders and text files of a dataset, read the same way on every machine: sorted, names in NFC, without hidden entries
and litter.
"""

from __future__ import annotations

import codecs
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.data.litter import reason
from common.data.location import Location
from common.data.spelling import as_text, on_disk, spellings
from common.types import Item

MARKS = {  # the longest first: one of UTF-32 begins like one of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
ZIP = b"PK\x03\x04"


@dataclass(frozen=True)
class Listing:
    """What a folder holds, by name, in code point order (upper case first). Links count as what they lead to."""

    folders: list[str]
    files: list[str]


def scan(location: Location, folder: Path) -> Listing:
    """What is in `folder`; in all folders of its name, if it is there in NFC and in NFD. The location notes the rest.

    Raises:
        UserError: It cannot be listed, or a name is not UTF-8 or occurs twice.
    """
    kinds: dict[str, list[str]] = {"folder": [], "file": []}
    for way in spellings(folder) or [on_disk(folder)]:
        for name, kind in _entries(location, way):
            if kind in kinds:
                kinds[kind].append(name)
            else:
                location.pass_over(folder / name, kind)
    if twice := [name for name, count in Counter(kinds["file"]).items() if count > 1]:
        raise location.error(
            f"{folder / twice[0]} is two files, whose names differ in how accents are stored; rename one"
        )
    return Listing(sorted(set(kinds["folder"])), sorted(kinds["file"]))


def subfolders(location: Location, folder: Path) -> list[str]:
    """Names of the folders in `folder`; see `scan`."""
    return scan(location, folder).folders


def files(location: Location, folder: Path) -> list[str]:
    """Names of the files in `folder`; see `scan`."""
    return scan(location, folder).files


def collect(location: Location, folder: Path, key: str, classes: Iterable[tuple[str, int, str]]) -> list[Item]:
    """The images of class folders, class by class.

    Args:
        location: For error messages.
        folder: Holds the class folders.
        key: Of `folder`.
        classes: Class folder, label and name.
    """
    items: list[Item] = []
    for subfolder, label, name in classes:
        start = f"{key}/{subfolder}/"
        items += [Item(start + file, label, name) for file in files(location, folder / subfolder)]
    return items


def text(location: Location, path: Path) -> str:
    """Content of a text file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: It is something else.
    """
    try:
        content = on_disk(path).read_bytes()
    except OSError as error:
        raise location.error(f"{path} cannot be read ({error.strerror})") from error
    if wide(content):
        raise location.error(f"{path} is not a text file in UTF-8: {_advice(content)}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise location.error(f"{path} is not a text file in UTF-8 ({error}): {_advice(content)}") from error


def _advice(content: bytes) -> str:
    if content.startswith(ZIP):
        return "it is a zip archive or a spreadsheet; unpack it, or save the table as CSV in UTF-8"
    encoding = wide(content)
    start = "" if encoding else "if it was written on Windows, "
    return f"{start}convert it with `iconv -f {encoding or 'windows-1252'} -t utf-8 <file> > <new file>`"


def wide(content: bytes) -> str | None:
    """The encoding of a text that takes two or four bytes for a letter, by its mark or its zeros; None: another text.

    >>> [wide("path,label".encode(encoding)) for encoding in ("utf-16", "utf-16-be", "utf-32", "utf-8")]
    ['utf-16', 'utf-16be', 'utf-32', None]
    """
    for mark, encoding in MARKS.items():
        if content.startswith(mark):
            return encoding
    if 4 * content.count(0) < len(content) or not content:
        return None
    return "utf-16be" if content[0] == 0 else "utf-16le"


def lines(location: Location, path: Path) -> list[tuple[str, str]]:
    """The lines that are not blank, stripped, each after where it stands, for error messages (`file, line 3`)."""
    stripped = (line.strip() for line in text(location, path).splitlines())
    return [(f"{path}, line {number}", line) for number, line in enumerate(stripped, start=1) if line]


def fields(location: Location, line: tuple[str, str], shape: str) -> list[str]:
    """A line of `lines` cut at blanks into as many fields as `shape` has; the last one keeps its blanks.

    Raises:
        UserError: It has fewer.
    """
    where, content = line
    count = len(shape.split())
    values = content.split(maxsplit=count - 1)
    if len(values) < count:
        raise location.error(f"{where}: '{content}' is not of the form '{shape}'")
    return values


def number(location: Location, where: str, value: str) -> int:
    """An integer in a text file.

    Raises:
        UserError: It is none.
    """
    try:
        return int(value)
    except ValueError:
        raise location.error(f"{where}: '{value}' is not a whole number") from None


def _entries(location: Location, folder: Path) -> list[tuple[str, str]]:
    """Name of every entry, and `folder`, `file` or why it is passed over."""
    # os.scandir knows files from folders without asking for each: ImageNet's 1.3 million take seconds.
    try:
        with os.scandir(folder) as entries:
            return [(name := _name(location, folder, entry.name), reason(name) or _kind(entry)) for entry in entries]
    except OSError as error:
        raise location.error(f"{folder} cannot be listed ({error.strerror})") from error


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
    except OSError:  # links in a circle, or into a folder that may not be entered
        return "broken link"
    return "broken link" if entry.is_symlink() else "no file"


def _name(location: Location, folder: Path, name: str) -> str:
    """A name as text; no question or result could write one that is not UTF-8.

    Raises:
        UserError: It is not, as in old archives.
    """
    try:
        return as_text(name)
    except UnicodeDecodeError:
        raise location.error(
            f"{folder} has the name {name!a}, which is not UTF-8; rename it (convmv -f latin1 -t utf8)"
        ) from None
