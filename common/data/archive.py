"""Unpack a zip file of photos into the cache, in a folder that is named by the SHA-256 of its content."""

from __future__ import annotations

import lzma
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from common.data.layout import PICTURES
from common.data.listing import Location, litter_reason, on_disk
from common.data.table import SUFFIXES
from common.runtime.progress import doing

UNREAD = (".tar", ".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
GB = 10**9
ALWAYS = 1 * GB  # unpacked size that is accepted from every archive
RATIO = 100  # a larger one is accepted up to this many times the archive's size; photos hardly shrink
ENCRYPTED = 0x1  # bit of a member's flags


def unpacked(location: Location, path: Path) -> Path:
    """Return the folder of a zip file's pictures and tables, unpacked if it is not yet; another path as it is.

    Folders that hold one folder only are stepped into. Litter and other files are passed over.

    Args:
        location: For errors, for what is passed over, and for the cache (`contents`).
        path: A file or folder, which may not exist.

    Raises:
        UserError: It is an archive of another kind, broken, encrypted or suspiciously large, or has a link, a path that
            leads out of it or a name twice; or the disk is full.
    """
    suffix = path.suffix.lower()
    if suffix not in (".zip", *UNREAD) or not on_disk(path).is_file():
        return path
    if suffix != ".zip":
        raise location.error(f"{path} is an archive of a kind that is not read; unpack it, and give its folder")
    with doing(f"unpacking {path.name}"):
        folder = _in_cache(location, path)
    while len(inside := list(folder.iterdir())) == 1 and inside[0].is_dir():
        folder = inside[0]
    return folder


def _in_cache(location: Location, path: Path) -> Path:
    """Return the folder of a zip file in the cache; it exists only if it is whole."""
    try:
        target = location.contents.cache / "unpacked" / location.contents.of(on_disk(path))
        with zipfile.ZipFile(on_disk(path)) as archive:
            members = _members(location, path, archive)
            if not target.is_dir():
                target.parent.mkdir(parents=True, exist_ok=True)
                _check_size(location, path, members, target.parent)
                _extract(archive, members, target)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError) as error:
        raise location.error(f"{path} is broken ({error}); get it anew, or unpack it, and give its folder") from error
    except OSError as error:
        raise location.error(
            f"{path} cannot be unpacked into {location.contents.cache} ({error.strerror or error})"
        ) from error
    return target


def _members(location: Location, path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the pictures and tables of an archive by their paths inside the folder to unpack into."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.replace("\\", "/")
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts or name.startswith("/") or re.match("[A-Za-z]:", name):
            raise location.error(f"{path}: {info.filename} leads out of the archive; it is not unpacked: make it anew")
        reasons = [litter_reason(part) for part in parts]
        if why := next(filter(None, reasons), None):
            location.pass_over(path / "/".join(parts[: reasons.index(why) + 1]), why)
            continue
        if stat.S_ISLNK(info.external_attr >> 16):
            raise location.error(f"{path}: {info.filename} is a link; make the archive anew with what it leads to")
        if name.endswith("/"):
            continue
        inside = "/".join(parts)
        if PurePosixPath(inside).suffix.lower() not in (*PICTURES, *SUFFIXES):
            location.pass_over(path / inside, "unknown suffix")
            continue
        if info.flag_bits & ENCRYPTED:
            raise location.error(f"{path} is encrypted; unpack it with its password, and give its folder")
        if inside in members:
            raise location.error(f"{path} holds {inside} twice; make the archive anew")
        members[inside] = info
    if not members:
        raise location.error(f"{path} holds no picture ({', '.join(PICTURES)}) and no table ({', '.join(SUFFIXES)})")
    return members


def _check_size(location: Location, path: Path, members: dict[str, zipfile.ZipInfo], folder: Path) -> None:
    total, packed = sum(info.file_size for info in members.values()), on_disk(path).stat().st_size
    if total > ALWAYS and total > RATIO * packed:
        raise location.error(
            f"{path} would unpack to {total / GB:.1f} GB; up to {ALWAYS // GB} GB and up to {RATIO} times its own size"
            " are unpacked: if the size is right, unpack it, and give its folder"
        )
    if total > (free := shutil.disk_usage(folder).free):
        raise location.error(
            f"{path} would unpack to {total / GB:.1f} GB, and {folder} has {free / GB:.1f} GB left; free some, or set"
            " FEWSHOT_CACHE or cache_dir to a folder elsewhere"
        )


def _extract(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], target: Path) -> None:
    # written beside the target, then renamed: within a file system that is atomic
    unfinished = Path(tempfile.mkdtemp(prefix="unpacking-", dir=target.parent))
    try:
        for inside, info in members.items():
            file = on_disk(unfinished / inside)
            file.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as packed, file.open("xb") as out:
                shutil.copyfileobj(packed, out)
        unfinished.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process has unpacked the same archive meanwhile
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # already gone if it was renamed
