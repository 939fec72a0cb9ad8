"""CLIP-Adapter (Gao et al. 2021): two small layers on the image's feature, mixed with the feature itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alert.draft.learners import zero_shot


class Adapter(nn.Module):
    """ReLU(W2 ReLU(W1 x)) without biases; a quarter of the width in between, as in the authors' code."""

    def __init__(self, width: int, reduction: int = 4) -> None:
        """
        Args:
            width: D.
            reduction: D / reduction hidden units.
        """
        super().__init__()
        hidden = width // reduction
        self.layers = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, width, bias=False), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        """From raw features to raw features. Shape of both: [N, D]."""
        return self.layers(images)


def logits(adapter: Adapter, images: Tensor, text: Tensor, ratio: float) -> Tensor:
    """
    Args:
        adapter: What is trained.
        images: Raw features: they are mixed before their length becomes 1. Shape: [N, D].
        text: Of length 1. Shape: [C, D].
        ratio: Share of the adapter; 0 leaves zero-shot CLIP.

    Returns:
        Shape: [N, C].
    """
    return zero_shot.logits(torch.lerp(images, adapter(images), ratio), text)
