"""Find and open the pictures to classify."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from common.data.archive import unpacked
from common.data.images import WHITE, decode, on, to_rgb
from common.data.layout import pictures
from common.data.listing import URL, Location, invisible, litter_reason, visible
from common.data.table import SUFFIXES, paths_in_table
from common.runtime.progress import say
from common.types import BadImage, Images, UserError

# Pictures to classify: found by folder, pattern or list, and opened by the keys of their answers.
Picture = str | Path | bytes | Image.Image


def find(what: str) -> dict[str, Path]:
    """Return the files that a folder, a pattern, a list or a single name stands for, by the names for their answers.

    Args:
        what: A picture; a folder or a zip file, with all pictures below it; a pattern such as `photos/*.jpg`; or a
            table with a column of paths, relative to its own folder (see common/data/table.py).

    Raises:
        UserError: No picture was found.
    """
    if URL.match(what):
        raise UserError(f"{what} is a URL, and URLs are not read; download the picture, and give its path")
    path = _as_written_or_decoded(Path(what).expanduser())
    path = unpacked(Listed("pictures", path.parent, path), path)
    if path.is_dir():
        names = sorted(each.relative_to(path).as_posix() for each in path.rglob("*") if each.is_file())
        kept = [
            name for name in names if not any(map(litter_reason, name.split("/")))
        ]  # skip what readers of datasets pass over
        found = {name: path / name for name in pictures(kept)}
    elif path.suffix.lower() in SUFFIXES and path.is_file():
        listed = Listed("pictures", path.parent, path.parent)
        found = paths_in_table(listed, path)
        for note in listed.notes:
            say(note)
    elif path.exists():
        found = {str(what): path}
    else:
        found = {name: Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()}
    if not found:
        hidden = f" (it has the invisible character {character})" if (character := invisible(what)) else ""
        raise UserError(
            f"{visible(what)}: no picture is there{hidden}; give a picture, a folder, a zip file, a pattern in quotes,"
            " or a CSV file"
        )
    return found


def _as_written_or_decoded(path: Path) -> Path:
    """Return a path, or if it does not exist, the path with percent-encoding decoded, if that exists."""
    decoded = Path(unquote(str(path)))
    return decoded if not path.exists() and decoded.exists() else path


class Listed(Location):
    """Location for a table of pictures to classify: its errors name no dataset."""

    def error(self, what: str) -> UserError:
        return UserError(what)


def paths_from(file: Path, pictures: Mapping[str, Path]) -> dict[str, str]:
    """Return the paths of pictures relative to the folder of a file, with `/`, by the pictures' names.

    Raises:
        UserError: A picture is not below that folder.
    """
    folder = Path(os.path.abspath(file)).parent
    found = {}
    for name, path in pictures.items():
        whole = Path(os.path.abspath(path))
        if not whole.is_relative_to(folder):
            raise UserError(
                f"--output {file}: {whole} is not below {folder}, and the file names pictures from its own folder on;"
                " write it beside the pictures or above them"
            )
        found[name] = whole.relative_to(folder).as_posix()
    return found


def names_of(text: str | None) -> list[str] | None:
    """Parse class names from the command line.

    >>> names_of("cat, great tit,"), names_of(None)
    (['cat', 'great tit'], None)
    """
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


class Photos:
    """New pictures, and for other keys the images of the run's dataset (see `Images`)."""

    def __init__(self, others: Images | None = None, background: str = WHITE) -> None:
        """
        Args:
            others: Images for other keys; None: there are none.
            background: Colour behind transparent parts.
        """
        self.others, self.background = others, background
        self.pictures: dict[str, Picture] = {}

    def show(self, pictures: Mapping[str, Picture]) -> None:
        """Replace the pictures by these."""
        self.pictures = dict(pictures)

    def open(self, image: str) -> Image.Image:
        if image not in self.pictures:
            return self._others(image).open(image)
        picture = self.pictures[image]
        if isinstance(picture, Image.Image):
            return to_rgb(picture, self.background)
        return decode(picture if isinstance(picture, bytes) else Path(picture).expanduser(), self.background)

    def stamp(self, image: str) -> str:
        if image not in self.pictures:
            return self._others(image).stamp(image)
        return on(self.background, hashlib.sha256(self.content(image)).hexdigest())

    def size(self, image: str) -> int:
        return len(self.content(image)) if image in self.pictures else self._others(image).size(image)

    def content(self, image: str, start: int = 0, length: int | None = None) -> bytes:
        if image not in self.pictures:
            return self._others(image).content(image, start, length)
        picture = self.pictures[image]
        if isinstance(picture, Image.Image):
            file = BytesIO()
            picture.save(file, "PNG")
            content = file.getvalue()
        elif isinstance(picture, bytes):
            content = picture
        else:
            try:
                content = Path(picture).expanduser().read_bytes()
            except OSError as error:
                raise BadImage(str(error.strerror or error).lower()) from error
        return content[start:] if length is None else content[start : start + length]

    def _others(self, image: str) -> Images:
        if self.others is None:
            raise BadImage(f"{image} is none of the given pictures")
        return self.others
