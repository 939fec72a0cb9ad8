"""Group photos that show the same moment or thing, so that no split trains on one of them and tests another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path, PurePath

from common.counted import counted
from common.data.images import taken
from common.data.listing import Location, on_disk
from common.data.table import Photo

GAP = 60  # seconds between two photos of one camera from which on they belong to different bursts
WAYS = ("burst", "folder")  # anything else is the name of a column


def grouped(location: Location, photos: Sequence[Photo], by: str, base: Path) -> list[Photo]:
    """Return the photos with their groups.

    Args:
        location: Location of the dataset, for error messages and notes.
        photos: Photos; with their groups already, if a column has them.
        by: `burst`: taken by one camera, each within GAP seconds of the one before (EXIF); `folder`: in one folder
            below a class folder; else the name of a column.
        base: The dataset's folder.

    Raises:
        UserError: No photo has a time or lies in such a folder, or there is no table with the column.
    """
    groups = {"burst": _bursts, "folder": _folders}[by](photos, base) if by in WAYS else [p.group for p in photos]
    if not any(groups):
        missing = {
            "burst": "no photo says when it was taken (EXIF's DateTimeOriginal)",
            "folder": "all photos lie directly in the folders of their classes",
        }.get(by, "the photos are read from folders, which have no columns, or the column is empty")
        raise location.error(
            f"data.reader.group_by={by}: {missing}; leave it out, or group by another (burst, folder, column)"
        )
    sizes = Counter(filter(None, groups))
    alone = groups.count("")
    location.notes.append(
        f"grouped by {by}: {counted(len(sizes), 'group')} with up to {counted(max(sizes.values()), 'photo')}"
        + (f", and {counted(alone, 'photo')} alone" if alone else "")
    )
    found = [replace(photo, group=group) for photo, group in zip(photos, groups, strict=True)]
    parts: dict[str, set[str]] = {}
    for photo in found:
        parts.setdefault(photo.group, set()).add(photo.part)
    if across := [group for group, names in parts.items() if group and len(names) > 1]:
        location.notes.append(
            f"warning: {counted(len(across), 'group')} of photos lie in more than one of train, val and test, first:"
            f" {across[0]}; the dataset's own split was kept"
        )
    return found


def _folders(photos: Sequence[Photo], base: Path) -> list[str]:
    """Return the folder of each photo; "" for one directly in the folder of its class or of the dataset."""
    above = [PurePath(photo.path).parent for photo in photos]
    return [
        "" if folder == PurePath() or folder.name == photo.name else folder.as_posix()
        for photo, folder in zip(photos, above, strict=True)
    ]


def _bursts(photos: Sequence[Photo], base: Path) -> list[str]:
    """Return the burst of each photo, named by its camera and first second; "" for a photo without a time."""
    with ThreadPoolExecutor() as pool:
        shots = list(pool.map(lambda photo: taken(on_disk(base / photo.path)), photos))
    groups = [""] * len(photos)
    last: tuple[str, datetime] | None = None
    name = ""
    for place in sorted((n for n, shot in enumerate(shots) if shot is not None), key=lambda n: shots[n] or ("", 0)):
        camera, time = shot = shots[place]  # type: ignore[misc]
        if last is None or last[0] != camera or (time - last[1]).total_seconds() > GAP:
            name = f"{camera} {time:%Y-%m-%d %H:%M:%S}".strip()
        groups[place], last = name, shot
    return groups
