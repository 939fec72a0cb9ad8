"""CLIP-Adapter (Gao et al. 2021): two small layers on the image's feature, mixed with the feature itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.few_shot.heads.base import DASSL_CROP, GradientHead, Pictures, Plan, Text, cosine_logits


class Adapter(nn.Module):
    """Bottleneck ReLU(W2 ReLU(W1 x)) without biases, a quarter as wide as the input, as in the authors' code."""

    def __init__(self, width: int, reduction: int = 4) -> None:
        """
        Args:
            width: D.
            reduction: Ratio of D to the number of hidden units.
        """
        super().__init__()
        hidden = width // reduction
        self.layers = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, width, bias=False), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map raw features to raw features. Shape of both: [N, D]."""
        return self.layers(images)


def logits(adapter: Adapter, images: Tensor, text: Tensor, ratio: float) -> Tensor:
    """Return CLIP-Adapter's logits.

    Args:
        adapter: Trained layers.
        images: Raw features; they are mixed before they are normalised. Shape: [N, D].
        text: Text weights of unit length. Shape: [C, D].
        ratio: Share of the adapter's output; 0 gives zero-shot CLIP.

    Returns:
        Logits. Shape: [N, C].
    """
    # (1 - ratio) image + ratio adapter(image), before normalisation
    return cosine_logits(torch.lerp(images, adapter(images), ratio), text)


class ClipAdapter(GradientHead):
    """CLIP-Adapter; the last epoch is kept."""

    crop = DASSL_CROP
    module: Adapter | None

    def __init__(
        self,
        *,
        seed: int,
        epochs: int,
        batch: int,
        learning_rate: float,
        weight_decay: float,
        ratio: float,
        drop_last: bool = False,
    ) -> None:
        """
        Args:
            seed: Seed of initialisation and order of the images.
            epochs: Passes over the shots.
            batch: Images in a step.
            learning_rate: Peak learning rate.
            weight_decay: Weight decay of SGD.
            ratio: Share of the adapter in the mixed feature.
            drop_last: Drop an incomplete last batch, see `Plan`.
        """
        super().__init__(seed=seed, plan=Plan("sgd", epochs, batch, learning_rate, weight_decay, drop_last))
        self.ratio = ratio

    def build(self) -> nn.Module:
        return Adapter(self.text.known.shape[1])

    def forward(self, pictures: Pictures, text: Text) -> Tensor:
        assert self.module is not None
        return logits(self.module, pictures.images, text.known, self.ratio)
