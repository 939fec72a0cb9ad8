"""Image features of a frozen vision tower, kept on disk: computed once, not once per epoch, run and sweep.

Keyed by the processed image (so by picture and processor) inside a folder per model and number format.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from common.runtime.disk_cache import DiskCache

log = logging.getLogger(__name__)


class FeatureStore:
    """A bounded folder of tensors; several processes may share one."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.cache = DiskCache(folder, limit_bytes, ".safetensors")

    @property
    def used(self) -> int:
        """Bytes of all stored tensors, as far as this process knows."""
        return self.cache.used

    @staticmethod
    def key(pixels: torch.Tensor, grid: torch.Tensor | None) -> str:
        """SHA-256 of a processed image: values, shape and grid."""
        digest = hashlib.sha256(f"{tuple(pixels.shape)} {None if grid is None else grid.tolist()}".encode())
        digest.update(pixels.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def get(self, key: str) -> torch.Tensor | None:
        """The stored tensor, or None."""
        content = self.cache.get(key)
        if content is None:
            return None
        try:
            return load(content)["features"]
        except SafetensorError as error:
            log.warning("computing the features %s anew: %s", key, error)
            return None

    def put(self, key: str, features: torch.Tensor) -> None:
        """Store a tensor, whole or not at all; one above the bound is not stored."""
        self.cache.put(key, save({"features": features.contiguous()}))
