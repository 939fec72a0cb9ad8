"""Photos in a CSV file: columns `path` (relative to the file), `label` (the class name) and, if you like, `split`."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from common.data.assemble import PARTS
from common.data.listing import text
from common.data.place import Place

COLUMNS = ("path", "label")


@dataclass(frozen=True)
class Photo:
    """One photo: its path inside the dataset's folder, its class, and train, val or test."""

    path: str
    name: str
    part: str


def photos_in_table(place: Place, path: Path, base: Path) -> list[Photo]:
    """The photos in the order of the rows; all are `train` without a column `split`.

    Args:
        place: For error messages.
        path: The CSV file, in UTF-8, with a header.
        base: The dataset's folder.

    Raises:
        UserError: A column is missing, or a row is empty, repeated, outside the folder, or of an unknown split.
    """
    photos: dict[str, Photo] = {}
    for where, row in _rows(place, path):
        photo = _photo(place, where, row, path.parent, base)
        if photo.path in photos:
            raise place.error(f"{where}: {photo.path} has a row already")
        photos[photo.path] = photo
    return list(photos.values())


def _rows(place: Place, path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows as `file, row 2` (counted as a spreadsheet does, the header is 1) and cells by column."""
    table = csv.reader(StringIO(text(place, path), newline=""))
    try:
        header = [cell.strip() for cell in next(table, [])]
        if missing := [column for column in COLUMNS if column not in header]:
            raise place.error(
                f"{path} has no column '{missing[0]}'; its header is '{','.join(header)}', but path,label or"
                " path,label,split is needed"
            )
        for number, cells in enumerate(table, start=2):
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise place.error(f"{path}, row {number} has {len(cells)} cells, but the header has {len(header)}")
            yield f"{path}, row {number}", dict(zip(header, map(str.strip, cells), strict=True))
    except csv.Error as error:
        raise place.error(f"{path} is not a CSV file ({error})") from error


def _photo(place: Place, where: str, row: dict[str, str], folder: Path, base: Path) -> Photo:
    for column in COLUMNS:
        if not row[column]:
            raise place.error(f"{where}: {column} is empty")
    part = row.get("split", "train")
    if part not in PARTS:
        raise place.error(f"{where}: split '{part}' is not one of {', '.join(PARTS)}")
    relative = Path(os.path.relpath(folder / row["path"], base)).as_posix()
    if relative.startswith(".."):
        raise place.error(
            f"{where}: {row['path']} is outside {base}; put the CSV file above the photos,"
            " and give data.folder=<its path>"
        )
    return Photo(relative, row["label"], part)
