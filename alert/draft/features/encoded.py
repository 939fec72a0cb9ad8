"""From pictures of a task to their features: looked up, or encoded batch by batch and kept.

Ranks share what is missing. All ranks call the methods together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from alert.draft.features.encoder import Encoder, TextEncoder
from alert.draft.features.store import Rows, Store, key_of
from alert.draft.features.views import TEST, View, see
from common.data.images import VERSION
from common.data.loading import on_all
from common.runtime.distributed import barrier, gather, rank, share_of
from common.runtime.progress import bar
from common.types import Images, UserError


class Encoded:
    """Features of one encoder."""

    def __init__(self, encoder: Encoder, cache_dir: Path, dtype: str, batch: int, workers: int = 4) -> None:
        """
        Args:
            encoder: Of the pictures.
            cache_dir: Of the run; features lie in `encoded` in it, a folder per encoder.
            dtype: That rows are kept in, `float16` or `float32`.
            batch: Pictures in a forward.
            workers: Threads that decode.
        """
        self.encoder, self.batch, self.workers = encoder, batch, workers
        self.folder, self.dtype = Path(cache_dir).resolve() / "encoded" / f"{encoder.identity}-{dtype}", dtype
        self.stores: dict[str, Store] = {}

    def images(self, images: Images, keys: Sequence[str], view: View = TEST) -> Rows:
        """Raw features of the pictures in a view. Rows of shape [D]."""
        return self._rows("images", (self.encoder.width,), images, keys, view)

    def maps(self, images: Images, keys: Sequence[str], view: View = TEST) -> Rows:
        """Features of the positions, of a CLIP. Rows of shape [P, D]."""
        clip: TextEncoder = self.encoder  # type: ignore[assignment]
        return self._rows("maps", (clip.positions, clip.width), images, keys, view)

    def close(self) -> None:
        """End this process's files."""
        for store in self.stores.values():
            store.close()

    def _rows(self, kind: str, shape: tuple[int, ...], images: Images, keys: Sequence[str], view: View) -> Rows:
        store = self.stores.get(kind)
        if store is None:
            store = self.stores[kind] = Store(self.folder / kind, int(np.prod(shape)), self.dtype)
        stamps = on_all(images.stamp, keys, self.workers)
        named = [key_of(key, stamp, view.name, str(VERSION)) for key, stamp in zip(keys, stamps, strict=True)]
        where = store.find(named)
        missing = {name: key for name, key, row in zip(named, keys, where[:, 0], strict=True) if row < 0}
        missing = gather(missing if rank() == 0 else None)[0] or {}  # others may write meanwhile: one rank says what
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
        mine = share_of(missing)

        def look(key: str) -> torch.Tensor:
            return see(images.open(key), key, view, self.encoder.look)

        with bar(f"encoding pictures ({kind})", len(mine)) as shown:
            for start in range(0, len(mine), self.batch):
                part = mine[start : start + self.batch]
                rows = encode(torch.stack(on_all(look, [key for _, key in part], self.workers)))
                store.add([name for name, _ in part], rows.flatten(1))
                for _ in part:
                    shown.advance()
        barrier()
