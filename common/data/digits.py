"""The embedded dataset: 1,797 real handwritten digits (UCI optical recognition, 8x8 pixels) shipped with scikit-learn.

The dataset has no split: the reader returns all images as the pool to pick from, and every image that is not picked is
a test image.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from common.data.listing import Location
from common.types import Item, Source, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE, LEVELS = 8, 16  # pixels per side; grey values 0..16


def _file() -> Path:
    # The file that sklearn.datasets.load_digits reads, read directly: importing scikit-learn takes seconds, and checks
    # of the data run before every job.
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise UserError("data=digits needs scikit-learn, which ships the images: pip install scikit-learn")
    return Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"


@cache
def _rows() -> tuple[tuple[int, ...], ...]:
    with gzip.open(_file(), "rt", encoding="ascii") as file:
        return tuple(tuple(int(float(value)) for value in row) for row in csv.reader(file))


class Digits:
    """Images of the digits, 8x8 pixels, white on black. An image's key is its row number."""

    def open(self, image: str) -> Image:
        from PIL import Image

        pixels = bytes(round(value * 255 / LEVELS) for value in self.content(image))
        return Image.frombytes("L", (SIDE, SIDE), pixels).convert("RGB")

    def stamp(self, image: str) -> str:
        return hashlib.sha256(self.content(image)).hexdigest()

    def size(self, image: str) -> int:
        return SIDE * SIDE

    def content(self, image: str, start: int = 0, length: int | None = None) -> bytes:
        """Return a byte for every pixel, from 0 to LEVELS."""
        pixels = bytes(_rows()[int(image)][: SIDE * SIDE])
        return pixels[start : None if length is None else start + length]


def read(location: Location) -> Source:
    """Read all digits, in file order. `location` is not used: nothing has to be downloaded."""
    fingerprint = hashlib.sha256(_file().read_bytes()).hexdigest()
    items = tuple(Item(str(i), row[-1], NAMES[row[-1]]) for i, row in enumerate(_rows()))
    return Source(NAMES, items, (), (), Digits(), fingerprint, "own split")
