"""Read generated images as more shots (CaFo's DALL-E images): a folder per class, or a split file with a folder."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.data.contents import Contents
from common.types import BadImage, Item, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Folder:
    """Images by their absolute paths; implements `Images`."""

    def __init__(self) -> None:
        self.contents = Contents()

    def open(self, image: str) -> Image:
        from common.data.images import decode

        return decode(Path(image))

    def stamp(self, image: str) -> str:
        try:
            return self.contents.of(Path(image))
        except OSError as error:
            raise BadImage(str(error.strerror).lower()) from error

    def size(self, image: str) -> int:
        return Path(image).stat().st_size

    def content(self, image: str, start: int = 0, length: int | None = None) -> bytes:
        data = Path(image).read_bytes()
        return data[start : None if length is None else start + length]


def pick(key: str, source: str, per_class: int, names: Sequence[str], seed: int) -> list[Item]:
    """Draw `per_class` generated images of every class.

    Args:
        key: Configuration key, for errors.
        source: A folder with a sub-folder per class, named as the class with spaces or underscores; or
            `<json>:<folder>`, a split file as CoOp's, {"train": [[path, label, class], …]}, and their folder.
        per_class: Number of images per class. A class with fewer gives all.
        names: Class names.
        seed: Seed of the draw; `random.sample` class by class, as in the authors' code.

    Returns:
        The drawn images, ordered by class.

    Raises:
        UserError: A path does not exist, or a class has no image.
    """
    # `<json>:<folder>` or a plain folder
    file, _, folder = source.partition(".json:")
    table = _of_file(key, Path(f"{file}.json"), Path(folder)) if folder else _of_folder(key, Path(source))
    rng, chosen = random.Random(seed), list[Item]()
    # One generator over all classes in order, like the authors: the draw of a class depends on those before it.
    for label, name in enumerate(names):
        there = table.get(name.replace("_", " ").lower(), [])
        if not there:
            raise UserError(f"{key}={source} has no picture of '{name}'; add some, or set {key}=null")
        for path in rng.sample(there, min(per_class, len(there))):
            chosen.append(Item(str(path), label, name))
    return chosen


def _of_folder(key: str, folder: Path) -> dict[str, list[Path]]:
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"{key}={folder} is no folder; it needs a sub-folder of pictures per class")
    return {
        each.name.replace("_", " ").lower(): sorted(path for path in each.iterdir() if path.suffix.lower() in SUFFIXES)
        for each in sorted(folder.iterdir())
        if each.is_dir()
    }


def _of_file(key: str, file: Path, folder: Path) -> dict[str, list[Path]]:
    file, folder = file.expanduser().resolve(), folder.expanduser().resolve()
    table: dict[str, list[Path]] = {}
    try:
        for relative, _, name in json.loads(file.read_text(encoding="utf-8"))["train"]:
            table.setdefault(str(name).replace("_", " ").lower(), []).append(folder / str(relative))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{key}: {file} cannot be read as a split file ({error}); it holds {{"train": [[path, label, class], …]}}'
        ) from error
    return table
