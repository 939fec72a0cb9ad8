"""Image features of a frozen vision tower, kept on disk: computed once, not once per epoch, run and sweep.

Keyed by the processed image (so by picture and processor) inside a folder per checkpoint and number format. When the
bound is reached, the features that were read longest ago make room.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

log = logging.getLogger(__name__)
RECOUNT = 200  # tensors stored between two looks at what other processes stored


class FeatureStore:
    """A folder of tensors with a bound on its size.

    Several processes may share one; each looks at the others' files every so often, so the bound is kept roughly.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit = folder, limit_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self.puts = 0
        for path in folder.glob("*.unfinished"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > 3600:  # its writer was killed
                    path.unlink()
        self.used = sum(size for _, size, _ in self._files())

    @staticmethod
    def key(pixels: torch.Tensor, grid: torch.Tensor | None) -> str:
        """SHA-256 of a processed image: values, shape and grid."""
        digest = hashlib.sha256(f"{tuple(pixels.shape)} {None if grid is None else grid.tolist()}".encode())
        digest.update(pixels.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def get(self, key: str) -> torch.Tensor | None:
        """The stored tensor, or None."""
        path = self._path(key)
        try:
            found = load_file(path)["features"]
            os.utime(path)
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            log.warning("computing %s anew: %s", path.name, error)
            return None
        return found

    def put(self, key: str, features: torch.Tensor) -> None:
        """Store a tensor, whole or not at all; one above the bound is not stored."""
        if features.nbytes > self.limit:
            return
        self._make_room(features.nbytes)
        unfinished = self.folder / f"{key}.{os.getpid()}.unfinished"
        save_file({"features": features.contiguous()}, unfinished)
        self.used += unfinished.stat().st_size
        os.replace(unfinished, self._path(key))

    def _make_room(self, size: int) -> None:
        self.puts += 1
        if self.used + size <= self.limit and self.puts % RECOUNT:
            return
        known = self._files()
        self.used = sum(length for _, length, _ in known)
        if self.used + size <= self.limit:
            return
        for _, length, path in sorted(known):
            if self.used + size <= 0.9 * self.limit:  # a little more than needed, so that this stays rare
                break
            path.unlink(missing_ok=True)
            self.used -= length

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of the last reading, bytes and path of every stored tensor."""
        known = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # another process made room at the same time
                status = path.stat()
                known.append((status.st_mtime, status.st_size, path))
        return known

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
