"""Image features of the vision tower, before and after projection, and a disk cache for those of a frozen tower.

Shapes: n images, P patches, V width of the tower, m tokens of an image, D width of the language model.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from common.models.adapters import without_adapters
from common.models.vlm import VLM
from common.runtime.disk_cache import DiskCache

if TYPE_CHECKING:
    from PIL.Image import Image


class VisionTower:
    """Vision tower and projector of a loaded model, without gradients."""

    def __init__(self, vlm: VLM, load_images: Callable[[Sequence[str]], list[Image]], batch: int = 32) -> None:
        """
        Args:
            vlm: Loaded model.
            load_images: Function from keys to RGB images of the model's size.
            batch: Number of images per forward.
        """
        self.vlm, self.load_images, self.batch = vlm, load_images, batch

    @property
    def architecture(self) -> str:
        """Return the `model_type` of config.json."""
        return str(self.vlm.model.config.model_type)

    @torch.no_grad()
    def hidden(self, keys: Sequence[str]) -> torch.Tensor:
        """Return the outputs of the tower in the order of the patches, in one forward: pass a batch at most.

        Shape: [n, P, V].
        """
        family, model = self.vlm.family, without_adapters(self.vlm.model)
        pictures = [[picture] for picture in self.load_images(keys)]
        parts = family.images(self.vlm.processor.image_processor(pictures, return_tensors="pt"))
        pixels = [pixels.to(model.dtype) for pixels, _ in parts]
        grids = [grid for _, grid in parts if grid is not None]
        inputs = family.pixel_inputs(pixels, grids)
        on_device = {name: tensor.to(self.vlm.device) for name, tensor in inputs.items()}
        # last_hidden_state is the output of the tower; pooler_output would be that of the projector
        states = family.in_order(model, model.get_image_features(**on_device).last_hidden_state, grids)
        return states.reshape(len(keys), -1, states.shape[-1])  # type: ignore[no-any-return]

    @torch.no_grad()
    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map tower outputs to input embeddings of the language model. Shape: [n, P, V] -> [n, m, D]."""
        return self.vlm.family.project(without_adapters(self.vlm.model), hidden)

    def vectors(self, keys: Sequence[str], patches: bool = False) -> torch.Tensor:
        """Return one vector per image of a batch: the mean of its patches [n, V], or all of them in a row [n, P V].

        fp32 on the CPU.
        """
        hidden = self.hidden(keys).float()
        return (hidden.flatten(1) if patches else hidden.mean(1)).cpu()


log = logging.getLogger(__name__)


class FeatureStore:
    """Disk cache of image features, so that a frozen tower computes them once for all epochs and runs.

    Keys are hashes of processed images, so they depend on image and processor; there is one folder per model and
    number format. Its size is bounded, and several processes may share it.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.cache = DiskCache(folder, limit_bytes, ".safetensors")

    @property
    def used(self) -> int:
        """Return the bytes of all stored tensors, as far as this process knows."""
        return self.cache.used

    @staticmethod
    def key(pixels: torch.Tensor, grid: torch.Tensor | None) -> str:
        """Return the SHA-256 of a processed image: values, shape and grid."""
        digest = hashlib.sha256(f"{tuple(pixels.shape)} {None if grid is None else grid.tolist()}".encode())
        digest.update(pixels.contiguous().view(torch.uint8).numpy().tobytes())  # as bytes: numpy has no bfloat16
        return digest.hexdigest()

    def get(self, key: str) -> torch.Tensor | None:
        """Return the stored tensor, or None."""
        content = self.cache.get(key)
        if content is None:
            return None
        try:
            return load(content)["features"]
        except SafetensorError as error:
            log.warning("computing the features %s anew: %s", key, error)
            return None

    def put(self, key: str, features: torch.Tensor) -> None:
        """Store a tensor atomically; one that is larger than the whole cache is not stored."""
        self.cache.put(key, save({"features": features.contiguous()}))
