"""Read datasets in the IDX files of MNIST: two for training, two for testing, plain or gzipped. No torch.

The embedded slice of Fashion-MNIST lies in common/data/fashion_mnist/; the complete dataset, or any other in this
format, is a folder with the four files.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.counted import counted
from common.data.listing import Location
from common.types import BadImage, Item, Source

if TYPE_CHECKING:
    from PIL.Image import Image

EMBEDDED = Path(__file__).parent / "fashion_mnist"
PARTS = {"train": "train", "test": "t10k"}
BYTES = 8  # type code of unsigned bytes, the only type that images have


@dataclass(frozen=True)
class Table:
    """Content of one file: `content` in rows of `width` bytes, with the `shape` from its header."""

    shape: tuple[int, ...]
    content: bytes

    @property
    def width(self) -> int:
        """Number of bytes in a row."""
        return len(self.content) // max(1, self.shape[0])


class Pictures:
    """Grey images; a key is `<dataset>/<part>/<row>`."""

    def __init__(self, tables: dict[str, Table]) -> None:
        """`tables`: the images by part."""
        self.tables = tables

    def open(self, image: str) -> Image:
        from PIL import Image

        height, width = self._find(image)[0].shape[1:]
        return Image.frombytes("L", (width, height), self.content(image)).convert("RGB")

    def stamp(self, image: str) -> str:
        return hashlib.sha256(self.content(image)).hexdigest()

    def size(self, image: str) -> int:
        return self._find(image)[0].width

    def content(self, image: str, start: int = 0, length: int | None = None) -> bytes:
        table, row = self._find(image)
        pixels = table.content[row * table.width : (row + 1) * table.width]
        return pixels[start : None if length is None else start + length]

    def _find(self, image: str) -> tuple[Table, int]:
        _, part, row = image.rsplit("/", 2)
        if part not in self.tables or not 0 <= int(row) < self.tables[part].shape[0]:
            raise BadImage("there is no such row")
        return self.tables[part], int(row)


def read(location: Location, names: Sequence[str], val_per_class: int = 0, embedded: bool = False) -> Source:
    """Read the images with their labels, in the order of the files.

    Args:
        location: The folder of the four files.
        names: Class names, by label.
        val_per_class: Number of training images of each class, the last ones, that become validation images.
        embedded: Read the slice in this package if no folder is given.

    Raises:
        UserError: A file is missing, damaged or does not fit the others or the names.
    """
    folder = EMBEDDED if embedded and location.folder == location.root else location.folder
    tables, labels, digest = {}, {}, hashlib.sha256()
    for part, prefix in PARTS.items():
        tables[part] = _read(location, folder, f"{prefix}-images-idx3-ubyte", 3)
        labels[part] = _read(location, folder, f"{prefix}-labels-idx1-ubyte", 1).content
        if tables[part].shape[0] != len(labels[part]):
            raise location.error(
                f"{folder}: {tables[part].shape[0]} {part} pictures, but {counted(len(labels[part]), 'label')}"
            )
        if (highest := max(labels[part], default=0)) >= len(names):
            raise location.error(
                f"{folder}: label {highest} in {part}, but data.reader.names has {counted(len(names), 'name')}"
            )
        # hash each part by itself, so that bytes cannot move between parts unnoticed
        for content in (tables[part].content, labels[part]):
            digest.update(hashlib.sha256(content).digest())
    items = {
        part: [_item(location, part, row, label, names) for row, label in enumerate(labels[part])] for part in PARTS
    }
    train, val = _without_last(items["train"], val_per_class)
    origin = f"own split, {val_per_class} of each class to watch" if val_per_class else "own split"
    return Source(tuple(names), train, val, tuple(items["test"]), Pictures(tables), digest.hexdigest(), origin)


def _item(location: Location, part: str, row: int, label: int, names: Sequence[str]) -> Item:
    return Item(location.key(f"{part}/{row}"), label, names[label])


def _without_last(items: Sequence[Item], count: int) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Return all but the last `count` items of each class, and these last ones; both in the given order."""
    left, first, last = Counter(item.label for item in items), list[Item](), list[Item]()
    for item in items:
        (last if left[item.label] <= count else first).append(item)
        left[item.label] -= 1
    return tuple(first), tuple(last)


def _read(location: Location, folder: Path, name: str, dimensions: int) -> Table:
    path = next((each for each in (folder / f"{name}.gz", folder / name) if each.is_file()), None)
    if path is None:
        raise location.error(f"{folder / name}.gz does not exist")
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        # header: two zero bytes, type, number of dimensions; then every dimension as a big-endian integer
        magic, start = data[:4], 4 + 4 * dimensions
        shape = struct.unpack(f">{dimensions}I", data[4:start])
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise location.error(f"{path} cannot be read ({error})") from error
    expected = 1
    for size in shape:
        expected *= size
    if magic != bytes([0, 0, BYTES, dimensions]) or len(data) - start != expected:
        raise location.error(f"{path} is no IDX file of bytes in {dimensions} dimensions, or not whole")
    return Table(shape, data[start:])
