"""What the vision tower says of pictures, before and after its projection into the language model.

Shapes: n pictures, P patches, V width of the tower, m tokens of a picture, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from common.models.adapters import without_adapters
from common.models.vlm import VLM

if TYPE_CHECKING:
    from PIL.Image import Image


class VisionTower:
    """Tower and projector of a loaded model, without gradients."""

    def __init__(self, vlm: VLM, load_images: Callable[[Sequence[str]], list[Image]], batch: int = 32) -> None:
        """
        Args:
            vlm: The model.
            load_images: From keys to RGB pictures of the model's size.
            batch: Pictures per forward.
        """
        self.vlm, self.load_images, self.batch = vlm, load_images, batch

    @property
    def architecture(self) -> str:
        """Of the model, as its config.json calls it."""
        return str(self.vlm.model.config.model_type)

    @torch.no_grad()
    def hidden(self, keys: Sequence[str]) -> torch.Tensor:
        """Outputs of the tower. Shape: [n, P, V]; all at once, so ask for a batch."""
        family, model = self.vlm.family, without_adapters(self.vlm.model)
        pictures = [[picture] for picture in self.load_images(keys)]
        parts = family.images(self.vlm.processor.image_processor(pictures, return_tensors="pt"))
        pixels = [pixels.to(model.dtype) for pixels, _ in parts]
        inputs = family.pixel_inputs(pixels, [grid for _, grid in parts if grid is not None])
        on_device = {name: tensor.to(self.vlm.device) for name, tensor in inputs.items()}
        states = model.get_image_features(**on_device).last_hidden_state
        return states.reshape(len(keys), -1, states.shape[-1])  # type: ignore[no-any-return]

    @torch.no_grad()
    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Tower outputs as input embeddings of the language model. Shape: [n, P, V] -> [n, m, D]."""
        return self.vlm.family.project(without_adapters(self.vlm.model), hidden)

    def vectors(self, keys: Sequence[str], patches: bool = False) -> torch.Tensor:
        """One vector per picture of a batch: the mean of its patches [n, V], or all of them in a row [n, P V].

        fp32 on the CPU.
        """
        hidden = self.hidden(keys).float()
        return (hidden.flatten(1) if patches else hidden.mean(1)).cpu()
