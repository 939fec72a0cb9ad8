"""VT-CLIP (Qiu et al. 2021), a reconstruction: neither its code nor its full text was to be had.

Known: CLIP is frozen, the class texts ask the positions of the image's map by cross-attention, a residual keeps the
texts. Our choices: 8 heads, no further layers, and an output projection that begins at zero, so training begins at
zero-shot CLIP.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from alert.draft.learners.zero_shot import SCALE

HEADS = 8


class TextAttention(nn.Module):
    """The class texts as an image changes them."""

    def __init__(self, width: int, heads: int = HEADS) -> None:
        """
        Args:
            width: D.
            heads: Must divide D.
        """
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        nn.init.zeros_(self.attention.out_proj.weight)
        nn.init.zeros_(self.attention.out_proj.bias)

    def forward(self, maps: Tensor, text: Tensor) -> Tensor:
        """
        Args:
            maps: Features of the positions. Shape: [N, P, D].
            text: Of length 1. Shape: [C, D].

        Returns:
            Shape: [N, C, D].
        """
        asked = text.expand(len(maps), -1, -1)
        return text + self.attention(asked, maps, maps, need_weights=False)[0]


def logits(attention: TextAttention, images: Tensor, maps: Tensor, text: Tensor) -> Tensor:
    """
    Args:
        attention: What is trained.
        images: Raw features. Shape: [N, D].
        maps: Features of the positions. Shape: [N, P, D].
        text: Of length 1. Shape: [C, D].

    Returns:
        Shape: [N, C].
    """
    guided = normalize(attention(maps, text), dim=2)
    return SCALE * torch.einsum("nd,ncd->nc", normalize(images, dim=1), guided)
