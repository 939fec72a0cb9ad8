"""Read photos from a table: a column of paths, one of class names and optionally `split`; or a label tool's JSON."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path, PurePath
from typing import Any

from common.counted import counted
from common.data import label_formats
from common.data.layout import Finder, parts_by_name, pictures, spelt
from common.data.listing import (
    Location,
    composed,
    files,
    on_disk,
    readable,
    scan,
    text,
)
from common.data.names import display
from common.data.source import PARTS

# Paths are relative to the table. Spreadsheets, pandas, label tools, camera traps and Kaggle write tables differently:
# CSV or JSON, separators, names of columns and splits, blank lines and trailing separators may vary.

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
UNREAD = (".parquet", ".xlsx", ".xls", ".ods", ".xml", ".arrow")
SEPARATORS = (",", ";", "\t")
# Names of the columns, in lower case and without blanks, hyphens and underscores.
COLUMNS = {
    "path": (
        *("path", "paths", "file", "files", "image", "images"),
        *("filename", "filenames", "filepath", "filepaths", "imagepath", "imagepaths"),
    ),
    "label": ("label", "labels", "class", "classes", "classname", "category", "categories"),
    "split": ("split",),
}
# Names with another meaning in many tables, used only if a table has none of COLUMNS; the first one found counts. They
# come from camera traps (the folder, if another column has the file), Kaggle and Label Studio.
OTHERWISE = {"path": ("relativepath", "imageid", "id"), "label": ("choice", "species", "commonname"), "split": ()}
NEEDED = ("path", "label")
HALF = re.compile("[\ud800-\udfff]")  # lone surrogates
BEGINNING = 1 << 16  # bytes of a table that are read for its header


@dataclass(frozen=True)
class Photo:
    """One photo: its path inside the dataset's folder, its class, train, val or test, and its group (`Item.group`)."""

    path: str
    name: str
    part: str
    group: str = ""


def photos_in_table(location: Location, path: Path, base: Path, group: str | None = None) -> list[Photo]:
    """Return the photos in the order of the rows; without a column `split`, all are `train`.

    Args:
        location: Location of the dataset, for error messages.
        path: The table, in UTF-8: CSV with a header, JSON lines, a JSON list of objects, COCO's or Label Studio's JSON.
        base: The dataset's folder.
        group: Name of the column with the groups of the photos; None: there is none.

    Raises:
        UserError: A column is missing or occurs twice, or a row is empty, repeated, outside the folder, a URL, or of an
            unknown split; or the table has ids for paths and no image with such a name exists.
    """
    rows = list(_rows(location, path, NEEDED, group))
    parts = parts_by_name(dict.fromkeys(row["split"] for _, row in rows if "split" in row))
    find = Finder(location, path)
    photos: dict[str, Photo] = {}
    for where, row in rows:
        photo = _photo(location, where, row, parts, find, base)
        if photo.path in photos:
            raise location.error(f"{where}: {photo.path} has a row already")
        photos[photo.path] = photo
    find.conclude()
    return list(photos.values())


def corrections_in(
    location: Location, photos: Sequence[Photo], path: Path, base: Path
) -> tuple[dict[str, str], list[Photo]]:
    """Read a table of corrections: a run's doubts.csv, feedback.csv of the served page, or a label tool's export.

    A row whose path is a photo of the dataset gives it another class, or takes it out if its label is empty; its own
    class changes nothing. A row whose path is a file beside the table adds a photo; without a label it is passed over.

    Args:
        location: Location of the dataset, for error messages.
        photos: Photos of the dataset.
        path: The table.
        base: The dataset's folder.

    Returns:
        The other classes of the dataset's photos by their paths, and the photos that are added, with paths relative to
        the table.

    Raises:
        UserError: The table cannot be read, two rows disagree, or the path of one is neither.
    """
    if not on_disk(path).is_file():
        raise location.error(f"data.reader.corrections={path} does not exist; give the table of corrections")
    own = {photo.path: photo.name for photo in photos}
    # a class is written as its folder is, or as it is shown: blue_tit or blue tit
    written = {display(name): name for name in own.values()}
    labels: dict[str, str] = {}
    find = Finder(location, base / path.name)
    for where, row in _rows(location, path, NEEDED):
        image, label = _corrected_photo(location, where, row["path"], own, find, path), row["label"]
        label = written.get(display(label), label)
        if label == own.get(image):
            continue  # left as it is; doubts.csv names a photo once for every doubt
        if labels.setdefault(image, label) != label:
            raise location.error(f"{where}: {image} has another label in an earlier row")
    find.conclude()
    added = [Photo(image, label, "train") for image, label in labels.items() if image not in own and label]
    return {image: label for image, label in labels.items() if image in own}, added


def _corrected_photo(
    location: Location, where: str, written: str, own: Mapping[str, str], find: Finder, table: Path
) -> str:
    """Return the path of a photo in the dataset's folder, or beside the table if the dataset has no such photo.

    Raises:
        UserError: There is neither.
    """
    for way in spelt(written):
        if composed(way) in own:
            return composed(way)
    for way in spelt(written):
        if on_disk(table.parent / way).is_file():
            inside = os.path.relpath(readable(table.parent / way), readable(find.folder))
            return inside if inside in own else way
    if (found := composed(find(where, written))) in own:
        return found
    raise location.error(f"{where}: {written} is no photo of {location.folder}, and no file beside the table")


def paths_in_table(location: Location, path: Path) -> dict[str, Path]:
    """Return the images of a table that may lack labels, by their paths as they are written there; of a COCO file or an
    export of Label Studio also those without a class.

    Raises:
        UserError: There is no column of paths, or a path is a URL.
    """
    find = Finder(location, path)
    names = {_path_in(row): where for where, row in _rows(location, path, ("path",)) if row["path"]}
    found = {name: path.parent / Path(find(where, name)).expanduser() for name, where in names.items()}
    find.conclude()
    return found


def lacks(location: Location, path: Path) -> str:
    """Return why a file in a folder of photos is not a table of photos and classes; empty if it is one.

    Only the beginning of the file is read.
    """
    try:
        with on_disk(path).open("rb") as file:
            start = file.read(BEGINNING).decode("utf-8-sig", "replace")
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    first = next((line for line in start.splitlines() if line.strip()), "")
    try:
        header = _keys(json.loads(first)) if path.suffix.lower() in (".jsonl", ".ndjson") else _cells(first)
    except (ValueError, csv.Error) as error:
        return f"cannot be read ({error})"
    hits = {key: _hits(header, key) for key in NEEDED}
    return "; ".join(
        f"has no column '{key}'" if not columns else f"has {len(columns)} columns that could be the {key}"
        for key, columns in hits.items()
        if len(columns) != 1
    )


def _rows(
    location: Location, path: Path, needed: Sequence[str], group: str | None = None
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield rows: `file, row 2` (counted as a spreadsheet does), and cells by the keys of COLUMNS and `folder`, and by
    `group` if that is the name of a column.
    """
    if path.suffix.lower() in UNREAD:
        raise location.error(f"{path} is a file of a kind that is not read; save a CSV file with path,label")
    is_json = path.suffix.lower() in (".json", ".jsonl", ".ndjson")
    rows = _records(location, path, needed == NEEDED) if is_json else _lines(location, path)
    header = next(rows, ("", []))[1]
    columns = _columns(location, path, header, needed)
    if group is not None:
        columns["group"] = _group_column(location, path, header, group)
    for where, cells in rows:
        yield where, {key: cells[column].strip() for key, column in columns.items()}


def _lines(location: Location, path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the header of a CSV file, then its rows, as long as the header."""
    content = text(location, path)
    first = next((line for line in content.splitlines() if line.strip()), "")
    table = csv.reader(StringIO(content, newline=""), delimiter=_separator(first), skipinitialspace=True, strict=True)
    header: list[str] = []
    try:
        for number, cells in enumerate(table, start=1):
            if not _trimmed(cells):
                continue
            where = f"{path}, row {number}"
            if not header:
                header = cells
            # shorter rows are accepted if only trailing empty columns are missing, longer ones if the rest is empty
            elif len(cells) < len(_trimmed(header)) or len(_trimmed(cells)) > len(header):
                raise location.error(f"{where} has {counted(len(cells), 'cell')}, but the header has {len(header)}")
            yield where, cells
    except csv.Error as error:
        raise location.error(f"{path} is not a CSV file ({error}, line {table.line_num})") from error


def _records(location: Location, path: Path, labelled: bool) -> Iterator[tuple[str, list[str]]]:
    """Yield the keys of objects in JSON, then the values of each object. `labelled`: see `label_formats.rows`."""
    content = text(location, path)
    try:
        if path.suffix.lower() == ".json":
            objects = json.loads(content)
        else:
            objects = [json.loads(line) for line in content.splitlines() if line.strip()]
    except ValueError as error:
        raise location.error(f"{path} is not JSON ({error})") from error
    if (exported := label_formats.rows(location, path, objects, labelled)) is not None:
        yield "", list(NEEDED)
        yield from ((where, [_value(location, where, cell) for cell in cells]) for where, *cells in exported)
        return
    if not isinstance(objects, list) or not all(isinstance(each, dict) for each in objects):
        raise location.error(
            f"{path} is no list of objects with a path and a label each, no COCO file (images, annotations,"
            " categories) and no export of Label Studio; write one of these, or a CSV file with path,label"
        )
    # objects may lack keys: the header is the union of all keys, in the order of appearance
    header = list(dict.fromkeys(key for each in objects for key in each))
    yield "", header
    for number, each in enumerate(objects, start=1):
        where = f"{path}, object {number}"
        yield where, [_value(location, where, each.get(key)) for key in header]


def _value(location: Location, where: str, value: Any) -> str:
    content = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if HALF.search(content):  # JSON can contain lone surrogates, but paths and UTF-8 cannot
        raise location.error(f"{where} has half a letter ({HALF.findall(content)[0]!a}); write the file anew")
    return content


def _keys(content: Any) -> list[str]:
    if not isinstance(content, dict):
        raise ValueError("its first line is no object")
    return list(content)


def _cells(line: str) -> list[str]:
    return next(csv.reader([line], delimiter=_separator(line), skipinitialspace=True), [])


def _separator(first: str) -> str:
    """Return the separator that finds the needed columns in a header; else the one that gives the most cells."""
    headers = {one: [cell.strip(' "') for cell in first.split(one)] for one in SEPARATORS}
    return max(SEPARATORS, key=lambda one: (all(_hits(headers[one], key) for key in NEEDED), len(headers[one])))


def _hits(header: Sequence[str], key: str) -> list[int]:
    """Return the columns that may be meant by a key of COLUMNS."""
    words = [_word(cell) for cell in header]
    for names in (COLUMNS[key], *((name,) for name in OTHERWISE[key])):
        if hits := [index for index, word in enumerate(words) if word in names]:
            return hits
    return []


def _columns(location: Location, path: Path, header: Sequence[str], needed: Sequence[str]) -> dict[str, int]:
    """Return the positions of columns by the keys of COLUMNS, and of `folder` if paths are only file names.

    Raises:
        UserError: A needed column is missing, or two could be meant.
    """
    columns: dict[str, int] = {}
    for key in COLUMNS:
        hits = _hits(header, key)
        if len(hits) > 1:
            both = " and ".join(f"'{header[index].strip()}'" for index in hits[:2])
            raise location.error(f"{path} has the columns {both}, and each could be the {key}; rename or remove one")
        if not hits and key in needed:
            raise location.error(
                f"{path} has no column '{key}'; its header is '{', '.join(map(str.strip, header))}', but"
                f" {'path' if needed == ('path',) else 'path,label or path,label,split'} is needed"
            )
        if hits:
            columns[key] = hits[0]
    names = {key: header[column].strip() for key, column in columns.items()}
    # camera traps: a file name in one column, its folder in another
    if _word(names.get("path", "")) in ("file", "filename"):
        folders = [index for index, cell in enumerate(header) if _word(cell) == "relativepath"]
        columns |= {"folder": folders[0]} if folders else {}
    if any(key != name for key, name in names.items()) and needed == NEEDED:
        location.notes.append(
            f"{path.name}: " + ", ".join(f"column '{name}' is the {key}" for key, name in names.items())
        )
    return columns


def _group_column(location: Location, path: Path, header: Sequence[str], group: str) -> int:
    """Return the position of the column of groups. Raises UserError if there is none, or there are several."""
    hits = [index for index, cell in enumerate(header) if _word(cell) == _word(group)]
    if len(hits) != 1:
        raise location.error(
            f"data.reader.group_by={group} is the name of {counted(len(hits), 'column')} of {path}; name one of"
            f" {', '.join(map(str.strip, header))}, or group by burst or folder"
        )
    return hits[0]


def _word(cell: str) -> str:
    return re.sub(r"[\s_-]", "", cell.lower())


def _trimmed(cells: Sequence[str]) -> list[str]:
    """Drop empty cells at the end: some programs end every row with a separator."""
    full = [index for index, cell in enumerate(cells) if cell.strip()]
    return list(cells[: full[-1] + 1]) if full else []


def _path_in(row: Mapping[str, str]) -> str:
    """Return the path of a row: its file, in the folder of another column unless that one includes the file."""
    folder, file = row.get("folder", "").replace("\\", "/").rstrip("/"), row["path"]
    if not folder or "/" in file or "\\" in file:
        return file
    return folder if folder.rpartition("/")[2] == file else f"{folder}/{file}"


def _photo(
    location: Location, where: str, row: dict[str, str], parts: Mapping[str, str], find: Finder, base: Path
) -> Photo:
    for key in NEEDED:
        if not row[key]:
            raise location.error(f"{where}: {key} is empty")
        if "\0" in row[key]:
            raise location.error(f"{where}: {key} has the character NUL; write the file anew")
    if row["label"].startswith(('["', '{"')):
        raise location.error(f"{where}: label {row['label']} is not one word; give each photo one class")
    if "split" in row and row["split"] not in parts:
        raise location.error(f"{where}: split '{row['split']}' is not one of {', '.join(PARTS)}")
    relative = os.path.relpath(readable(find.folder / find(where, _path_in(row))), readable(base))
    if relative.split(os.sep)[0] == os.pardir:
        raise location.error(
            f"{where}: {row['path']} is outside {base}; put the CSV file above the photos,"
            " and give data.folder=<its path>"
        )
    part = parts.get(row.get("split", ""), "train")
    return Photo(relative, composed(row["label"]), part, composed(row.get("group", "")))


# Tables in a folder of photos: choosing the one that describes the photos.
#
# Hugging Face's imagefolder has `metadata.csv` or `metadata.jsonl` in the folder or in the folders of its parts, Kaggle
# `train.csv` beside a folder `train`; label tools write a file of any name.

METADATA = ("metadata.csv", "metadata.jsonl")
READ = (".csv", ".tsv", ".jsonl", ".ndjson")  # found automatically; a JSON file may be large, and is read only if given
MENTIONED = (*READ, ".json", *UNREAD)
FORM = "submission"  # Kaggle's sample submission has a label for every test image, all of them the same


def usable(location: Location, folder: Path) -> list[str]:
    """Return the files of a folder that have a column of paths and one of labels."""
    tables = [name for name in files(location, folder) if PurePath(name).suffix.lower() in READ]
    return [name for name in tables if FORM not in name.lower() and not lacks(location, folder / name)]


def metadata(location: Location, folder: Path) -> dict[str, str]:
    """Return imagefolder's tables by their paths in the folder, with the part of each; "" for the folder's own.

    Raises:
        UserError: There are two in one folder.
    """
    parts = parts_by_name(scan(location, folder).folders)
    found: dict[str, str] = {}
    for inside, part in {"": "", **{f"{name}/": part for name, part in parts.items()}}.items():
        names = [name for name in usable(location, folder / inside) if name.lower() in METADATA]
        if len(names) > 1:
            raise location.error(f"{folder / inside} has {names[0]} and {names[1]}; remove one")
        found |= {f"{inside}{name}": part for name in names}
    return {path: part for path, part in found.items() if not part} or found


def in_place_of_folders(location: Location, folder: Path) -> dict[str, str]:
    """Return the tables of a folder without class folders, in the form of `metadata`: those named like parts, or the
    only one; nothing if there are class folders or several other tables.
    """
    listing = scan(location, folder)
    parts = parts_by_name(listing.folders)
    # one folder with images may be the image folder of a table; several are classes
    full = [name for name in listing.folders if name not in parts and pictures(files(location, folder / name))]
    if len(full) > 1:
        return {}
    names = usable(location, folder)
    by_part = parts_by_name([PurePath(name).stem for name in names])
    tables = {name: by_part[stem] for name in names if (stem := PurePath(name).stem) in by_part}
    if "train" in tables.values() and len(set(tables.values())) == len(tables):
        return tables
    return {names[0]: ""} if len(names) == 1 else {}


def photos_in_tables(
    location: Location, folder: Path, tables: Mapping[str, str], base: Path, group: str | None = None
) -> list[Photo]:
    """Return the photos of several tables.

    Args:
        location: Location of the dataset, for errors and for a note on what was read.
        folder: Folder that holds the tables.
        tables: Path in the folder and part of each table; "": a column or the first folder of its paths gives the part.
        base: The dataset's folder.
        group: Name of the column with the groups of the photos; None: there is none.
    """
    location.notes.append(f"the photos are those of {', '.join(tables)}")
    photos = []
    for name, part in tables.items():
        found = photos_in_table(location, folder / name, base, group)
        if part:
            found = [replace(photo, part=part) if photo.part == "train" else photo for photo in found]
        photos += found
    return photos if any(tables.values()) else _by_first_folder(photos)


def _by_first_folder(photos: Sequence[Photo]) -> list[Photo]:
    """Set parts by the first folders of the paths, if all of these mean parts and nothing else gives the parts."""
    parts = parts_by_name({photo.path.split("/")[0] for photo in photos})
    told = any(photo.part != "train" for photo in photos)
    if told or not {"train", "test"} <= set(parts.values()):
        return list(photos)
    if not all(photo.path.split("/")[0] in parts for photo in photos):
        return list(photos)
    return [replace(photo, part=parts[photo.path.split("/")[0]]) for photo in photos]


def others(location: Location, folder: Path) -> str:
    """Return a hint on the tables in a folder whose photos could not be read; empty if there are none."""
    names = [name for name in files(location, folder) if PurePath(name).suffix.lower() in MENTIONED]
    if not names:
        return ""
    good = usable(location, folder)
    if good:
        return f". {folder / good[0]} is there: data.folder={folder / good[0]} reads the classes from it"
    name = names[0]
    if PurePath(name).suffix.lower() in UNREAD:
        return f". {folder / name} is there, but such files are not read: save a CSV file with path,label"
    if PurePath(name).suffix.lower() == ".json":
        return (
            f". {folder / name} is there: data.folder={folder / name} reads a list of objects with path and label,"
            " COCO's annotations or Label Studio's export"
        )
    return f". {folder / name} is there, but {lacks(location, folder / name)}: name its columns path,label"
