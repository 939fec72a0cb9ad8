"""Keep features on disk, memory-mapped, so that each view of an image is encoded only once over all runs.

    <folder>/<writer>.keys    16 bytes per row: a hash of what was encoded
    <folder>/<writer>.rows    the row itself: `width` numbers of the number format

A writer appends rows first and their keys second, so a row counts when its key is complete: a kill at any moment loses
only the current batch. Every process appends to files of its own and reads all files. If the disk is full or not
writable, further rows stay in the memory of the process.

`CachedFeatures` looks the images of a task up, and encodes in batches what is missing. Ranks share that work, and all
call its methods together.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray

from common.data.images import VERSION
from common.data.loading import on_all
from common.few_shot.encoders.encoder import TEST, Encoder, TextEncoder, View, preprocess
from common.runtime.distributed import barrier, gather, rank, share_of
from common.runtime.progress import bar
from common.types import Images, UserError

log = logging.getLogger(__name__)
MEMORY = "memory"  # name of a table that has no file
KEY = np.dtype("S16")  # compared as bytes; NumPy ignores trailing zeros, so no key ends with one (`key_of`)


def key_of(*parts: str) -> bytes:
    """Return the 16-byte key of a row."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()[:15]
    return digest + b"\x01"


class Store:
    """A table of rows by key. Not thread-safe."""

    def __init__(self, folder: Path, width: int, dtype: str) -> None:
        """
        Args:
            folder: Folder of this table alone; created if missing.
            width: Number of values in a row.
            dtype: `float16` or `float32`.
        """
        self.folder, self.width, self.dtype = folder, width, np.dtype(dtype)
        self.writable = True
        self.writer: tuple[IO[bytes], IO[bytes]] | None = None
        self.kept: list[tuple[NDArray[np.bytes_], NDArray[np.generic]]] = []  # rows that are not on disk
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._give_up(error)
        self.tables: dict[str, NDArray[np.generic]] = {}  # by file; never reordered: `find` returns positions in it
        self.refresh()

    def refresh(self) -> None:
        """Read the keys that all processes have written so far."""
        if self.writer is not None:
            for file in self.writer:
                file.flush()
        keys, where = [], []
        # Files of all writers. A row counts only if both its key and its values are complete.
        for path in sorted(self.folder.glob("*.keys")):
            rows = path.with_suffix(".rows")
            size = self.width * self.dtype.itemsize
            whole = min(path.stat().st_size // KEY.itemsize, rows.stat().st_size // size if rows.is_file() else 0)
            if whole == 0:
                continue
            self.tables[path.name] = np.memmap(rows, self.dtype, "r", shape=(whole, self.width))
            keys.append(np.fromfile(path, KEY, count=whole))
            # (table, row) of each key
            where.append(np.stack([np.full(whole, list(self.tables).index(path.name)), np.arange(whole)], 1))
        # Rows in memory look like one more table.
        if self.kept:
            self.tables[MEMORY] = np.concatenate([rows for _, rows in self.kept])
            keys.append(np.concatenate([names for names, _ in self.kept]))
            whole = len(keys[-1])
            where.append(np.stack([np.full(whole, list(self.tables).index(MEMORY)), np.arange(whole)], 1))
        # Sorted keys make `find` a binary search.
        every = np.concatenate(keys) if keys else np.empty(0, KEY)
        order = np.argsort(every, kind="stable")
        self.keys = every[order]
        self.where = (np.concatenate(where) if where else np.empty((0, 2), np.int64))[order]

    def find(self, keys: Sequence[bytes]) -> NDArray[np.int64]:
        """Return table and row of each key, -1 for missing ones. Shape: [N, 2]."""
        wanted = np.array(keys, KEY)
        if not len(self.keys) or not len(wanted):
            return np.full((len(wanted), 2), -1)
        # searchsorted gives the place where a key would be inserted; a key is there if the entry at that place equals
        # it.
        place = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        return np.where((self.keys[place] == wanted)[:, None], self.where[place], -1)

    def add(self, keys: Sequence[bytes], rows: torch.Tensor) -> None:
        """Append rows of shape [N, width]; the next `refresh` makes them visible."""
        values = rows.detach().cpu().numpy().astype(self.dtype)
        if values.shape != (len(keys), self.width):
            raise ValueError(f"{len(keys)} keys for rows of shape {values.shape}, not of width {self.width}")
        names = np.array(keys, KEY)
        if self.writable:
            try:
                if self.writer is None:
                    name = uuid.uuid4().hex
                    self.writer = (self.folder / f"{name}.rows").open("ab"), (self.folder / f"{name}.keys").open("ab")
                # rows before keys: see the module docstring
                for file, content in zip(self.writer, (values.tobytes(), names.tobytes()), strict=True):
                    file.write(content)
                    file.flush()
            except OSError as error:
                self._give_up(error)
        if not self.writable:
            self.kept.append((names, values))

    def _give_up(self, error: OSError) -> None:
        self.writable = False
        with suppress(OSError):  # closing flushes again, which fails again
            self.close()
        self.writer = None
        log.warning("features are kept in memory, not in %s: %s (cache_dir)", self.folder, error.strerror)

    def read(self, where: NDArray[np.int64]) -> torch.Tensor:
        """Read the rows that `find` found, as fp32. Shape: [N, width]."""
        found, tables = np.empty((len(where), self.width), np.float32), list(self.tables.values())
        for number in np.unique(where[:, 0]):
            mine = where[:, 0] == number
            found[mine] = tables[number][where[mine, 1]]
        return torch.from_numpy(found)

    def close(self) -> None:
        """Close this process's files."""
        if self.writer is not None:
            with ExitStack() as files:
                for file in self.writer:
                    files.callback(file.close)
            self.writer = None


class Rows:
    """Rows of a store in a given order, read from disk on access, so that any number of them needs no memory."""

    def __init__(self, store: Store, where: NDArray[np.int64], shape: tuple[int, ...]) -> None:
        """
        Args:
            store: Table to read from.
            where: Table and row of each entry, from `Store.find`. Shape: [N, 2].
            shape: Shape of one row.
        """
        self.store, self.where, self.shape = store, where, shape

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, part: slice) -> torch.Tensor:
        """Read a slice as fp32. Shape: [rows of the slice, *shape]."""
        rows = self.store.read(self.where[part])
        return rows.view(len(rows), *self.shape)


class CachedFeatures:
    """Cached features of one encoder."""

    def __init__(self, encoder: Encoder, cache_dir: Path, dtype: str, batch: int, workers: int = 4) -> None:
        """
        Args:
            encoder: Encoder that computes the features.
            cache_dir: Cache folder of the run; features lie in its sub-folder `encoded`, one folder per encoder.
            dtype: Number format of the stored rows, `float16` or `float32`.
            batch: Images in a forward.
            workers: Number of decoding threads.
        """
        self.encoder, self.batch, self.workers = encoder, batch, workers
        # the same weights give other features for pictures prepared in another way
        name = f"{encoder.identity}-{encoder.look.name}-{dtype}"
        self.folder, self.dtype = Path(cache_dir).resolve() / "encoded" / name, dtype
        self.stores: dict[str, Store] = {}

    def images(self, images: Images, keys: Sequence[str], view: View = TEST) -> Rows:
        """Return raw features of images in a view. Rows of shape [D]."""
        return self._rows("images", (self.encoder.width,), images, keys, view)

    def maps(self, images: Images, keys: Sequence[str], view: View = TEST) -> Rows:
        """Return features of the positions; the encoder must be a CLIP. Rows of shape [P, D]."""
        clip: TextEncoder = self.encoder  # type: ignore[assignment]
        return self._rows("maps", (clip.positions, clip.width), images, keys, view)

    def close(self) -> None:
        """Close this process's files."""
        for store in self.stores.values():
            store.close()

    def _rows(self, kind: str, shape: tuple[int, ...], images: Images, keys: Sequence[str], view: View) -> Rows:
        store = self.stores.get(kind)
        if store is None:
            store = self.stores[kind] = Store(self.folder / kind, int(np.prod(shape)), self.dtype)
        stamps = on_all(images.stamp, keys, self.workers)
        # A key covers the content of the file, the view and the version of our decoding, not only the image's name.
        named = [key_of(key, stamp, view.name, str(VERSION)) for key, stamp in zip(keys, stamps, strict=True)]
        where = store.find(named)
        missing = {name: key for name, key, row in zip(named, keys, where[:, 0], strict=True) if row < 0}
        # Other processes may write meanwhile, so ranks could differ in what is missing: rank 0's list counts for all.
        missing = gather(missing if rank() == 0 else None)[0] or {}
        if missing:
            self._encode(kind, store, images, list(missing.items()), view)
            store.refresh()
            where = store.find(named)
            if (where < 0).any():
                raise UserError(
                    f"features that another rank has kept are not in {self.folder}; cache_dir must be one folder for"
                    " all machines of a few-shot run, on a shared disk"
                )
        return Rows(store, where, shape)

    def _encode(self, kind: str, store: Store, images: Images, missing: list[tuple[bytes, str]], view: View) -> None:
        encode = getattr(self.encoder, kind)
        # Each rank encodes its share and appends it to its own files; after the barrier every rank can read them all.
        mine = share_of(missing)

        def look(key: str) -> torch.Tensor:
            return preprocess(images.open(key), key, view, self.encoder.look)

        with bar(f"encoding pictures ({kind})", len(mine)) as shown:
            for start in range(0, len(mine), self.batch):
                part = mine[start : start + self.batch]
                rows = encode(torch.stack(on_all(look, [key for _, key in part], self.workers)))
                store.add([name for name, _ in part], rows.flatten(1))
                for _ in part:
                    shown.advance()
        barrier()
