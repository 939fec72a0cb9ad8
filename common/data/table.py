"""Photos in a CSV file: a column of paths (relative to the file), one of class names and, if you like, `split`.

Spreadsheets, pandas and other tools write such files in many ways; what differs in form alone is read: separators,
names of columns and splits, blank lines and trailing separators.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from common.counted import counted
from common.data.assemble import PARTS
from common.data.layout import parts_by_name
from common.data.listing import text
from common.data.location import Location
from common.data.spelling import composed, on_disk, readable

SEPARATORS = (",", ";", "\t")
# What a column is called, in lower case and without blanks, hyphens and underscores.
COLUMNS = {
    "path": (
        *("path", "paths", "file", "files", "image", "images"),
        *("filename", "filenames", "filepath", "filepaths", "imagepath", "imagepaths"),
    ),
    "label": ("label", "labels", "class", "classes", "classname", "category", "categories"),
    "split": ("split",),
}
NEEDED = ("path", "label")


@dataclass(frozen=True)
class Photo:
    """One photo: its path inside the dataset's folder, its class, and train, val or test."""

    path: str
    name: str
    part: str


def photos_in_table(location: Location, path: Path, base: Path) -> list[Photo]:
    """The photos in the order of the rows; all are `train` without a column `split`.

    Args:
        location: For error messages.
        path: The CSV file, in UTF-8, with a header.
        base: The dataset's folder.

    Raises:
        UserError: A column is missing or twice there, or a row is empty, repeated, outside the folder, or of an unknown
            split.
    """
    rows = list(_rows(location, path))
    parts = parts_by_name(dict.fromkeys(row["split"] for _, row in rows if "split" in row))
    photos: dict[str, Photo] = {}
    for where, row in rows:
        photo = _photo(location, where, row, parts, path.parent, base)
        if photo.path in photos:
            raise location.error(f"{where}: {photo.path} has a row already")
        photos[photo.path] = photo
    return list(photos.values())


def _rows(location: Location, path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows as `file, row 2` (counted as a spreadsheet does), and cells by the keys of COLUMNS."""
    content = text(location, path)
    separator = _separator(content)
    table = csv.reader(StringIO(content, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        rows = ((f"{path}, row {number}", cells) for number, cells in enumerate(table, start=1) if _trimmed(cells))
        header = next(rows, ("", []))[1]
        columns = _columns(location, path, header, separator)
        for where, cells in rows:
            if len(cells) < len(_trimmed(header)) or len(_trimmed(cells)) > len(header):
                raise location.error(f"{where} has {counted(len(cells), 'cell')}, but the header has {len(header)}")
            yield where, {key: cells[column].strip() for key, column in columns.items()}
    except csv.Error as error:
        raise location.error(f"{path} is not a CSV file ({error}, line {table.line_num})") from error


def _separator(content: str) -> str:
    """The separator with which the header has the needed columns; else the one that cuts it into most cells."""
    first = next((line for line in content.splitlines() if line.strip()), "")
    headers = {one: [cell.strip(' "') for cell in first.split(one)] for one in SEPARATORS}
    return max(SEPARATORS, key=lambda one: (_has_needed(headers[one]), len(headers[one])))


def _has_needed(header: Sequence[str]) -> bool:
    words = {_word(cell) for cell in header}
    return all(words.intersection(COLUMNS[key]) for key in NEEDED)


def _columns(location: Location, path: Path, header: Sequence[str], separator: str) -> dict[str, int]:
    """Where the columns are, by the keys of COLUMNS.

    Raises:
        UserError: A needed one is missing, or two could be meant.
    """
    columns: dict[str, int] = {}
    for key, words in COLUMNS.items():
        hits = [index for index, cell in enumerate(header) if _word(cell) in words]
        if len(hits) > 1:
            both = " and ".join(f"'{header[index].strip()}'" for index in hits[:2])
            raise location.error(f"{path} has the columns {both}, and each could be the {key}; rename or remove one")
        if not hits and key in NEEDED:
            raise location.error(
                f"{path} has no column '{key}'; its header is '{separator.join(header)}', but path,label or"
                " path,label,split is needed"
            )
        if hits:
            columns[key] = hits[0]
    names = {key: header[column].strip() for key, column in columns.items()}
    if any(key != name for key, name in names.items()):
        location.notes.append(
            f"{path.name}: " + ", ".join(f"column '{name}' is the {key}" for key, name in names.items())
        )
    return columns


def _word(cell: str) -> str:
    return re.sub(r"[\s_-]", "", cell.lower())


def _trimmed(cells: Sequence[str]) -> list[str]:
    """Without the empty cells at the end: some programs end every row with a separator."""
    full = [index for index, cell in enumerate(cells) if cell.strip()]
    return list(cells[: full[-1] + 1]) if full else []


def _photo(
    location: Location, where: str, row: dict[str, str], parts: Mapping[str, str], folder: Path, base: Path
) -> Photo:
    for key in NEEDED:
        if not row[key]:
            raise location.error(f"{where}: {key} is empty")
        if "\0" in row[key]:
            raise location.error(f"{where}: {key} has the character NUL; write the file anew")
    if "split" in row and row["split"] not in parts:
        raise location.error(f"{where}: split '{row['split']}' is not one of {', '.join(PARTS)}")
    relative = os.path.relpath(readable(folder / _slashes(folder, row["path"])), readable(base))
    if relative.split(os.sep)[0] == os.pardir:
        raise location.error(
            f"{where}: {row['path']} is outside {base}; put the CSV file above the photos,"
            " and give data.folder=<its path>"
        )
    return Photo(relative, composed(row["label"]), parts.get(row.get("split", ""), "train"))


def _slashes(folder: Path, path: str) -> str:
    """A path as written on Windows has backslashes, which elsewhere may be part of a name."""
    return path.replace("\\", "/") if "\\" in path and not os.path.exists(on_disk(folder / path)) else path
