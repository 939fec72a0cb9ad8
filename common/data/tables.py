"""Tables that lie in a folder of photos: which of them says what the photos are.

Hugging Face's imagefolder has `metadata.csv` or `metadata.jsonl` in the folder or in the folders of its parts, Kaggle
`train.csv` beside a folder `train`, label tools write a file of any name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath

from common.data.layout import parts_by_name, pictures
from common.data.listing import files, scan
from common.data.location import Location
from common.data.table import UNREAD, Photo, lacks, photos_in_table

METADATA = ("metadata.csv", "metadata.jsonl")
READ = (".csv", ".tsv", ".jsonl", ".ndjson")  # by their own names; a JSON file may be large, and is read if it is given
MENTIONED = (*READ, ".json", *UNREAD)
FORM = "submission"  # Kaggle's form for answers has labels for all test images, all of them the same


def usable(location: Location, folder: Path) -> list[str]:
    """The files of a folder that have a column of paths and one of labels."""
    tables = [name for name in files(location, folder) if PurePath(name).suffix.lower() in READ]
    return [name for name in tables if FORM not in name.lower() and not lacks(location, folder / name)]


def metadata(location: Location, folder: Path) -> dict[str, str]:
    """Tables of imagefolder, by their paths in the folder, with the part of each; "" is the folder's own.

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
    """The tables of a folder without class folders, as `metadata` gives them: those that are called like parts, or the
    only one; nothing if there are class folders, or several tables.
    """
    listing = scan(location, folder)
    parts = parts_by_name(listing.folders)
    full = [name for name in listing.folders if name not in parts and pictures(files(location, folder / name))]
    if len(full) > 1:
        return {}
    names = usable(location, folder)
    by_part = parts_by_name([PurePath(name).stem for name in names])
    tables = {name: by_part[stem] for name in names if (stem := PurePath(name).stem) in by_part}
    if "train" in tables.values() and len(set(tables.values())) == len(tables):
        return tables
    return {names[0]: ""} if len(names) == 1 else {}


def photos_in_tables(location: Location, folder: Path, tables: Mapping[str, str], base: Path) -> list[Photo]:
    """The photos of some tables.

    Args:
        location: For errors, and for a note on what was read.
        folder: Holds the tables.
        tables: By their paths in the folder, with the part of each; "": the table says so itself, or the first folder
            of its paths does.
        base: The dataset's folder.
    """
    location.notes.append(f"the photos are those of {', '.join(tables)}")
    photos = []
    for name, part in tables.items():
        found = photos_in_table(location, folder / name, base)
        if part:
            found = [replace(photo, part=part) if photo.part == "train" else photo for photo in found]
        photos += found
    return photos if any(tables.values()) else _by_first_folder(photos)


def _by_first_folder(photos: Sequence[Photo]) -> list[Photo]:
    """The photos with the parts that their first folders mean, if all do and nothing else says the parts."""
    parts = parts_by_name({photo.path.split("/")[0] for photo in photos})
    told = any(photo.part != "train" for photo in photos)
    if told or not {"train", "test"} <= set(parts.values()):
        return list(photos)
    if not all(photo.path.split("/")[0] in parts for photo in photos):
        return list(photos)
    return [replace(photo, part=parts[photo.path.split("/")[0]]) for photo in photos]


def others(location: Location, folder: Path) -> str:
    """What to say of the tables that lie in a folder whose photos could not be read; empty if there are none."""
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
        return f". {folder / name} is there: data.folder={folder / name} reads a list of objects with path and label"
    return f". {folder / name} is there, but {lacks(location, folder / name)}: name its columns path,label"
