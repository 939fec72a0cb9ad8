"""VT-CLIP (Qiu et al. 2021), a reconstruction: neither its code nor its full text was available.

Known: CLIP is frozen, the class texts attend to the positions of the image's map by cross-attention, and a residual
connection keeps the texts. Our choices: 8 heads, no further layers, and an output projection initialised to zero, so
that training starts at zero-shot CLIP.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from common.few_shot.heads.base import RECONSTRUCTION, SCALE, GradientHead, Pictures, Plan, Text, maps_of

HEADS = 8


class TextAttention(nn.Module):
    """Class texts adapted to an image by cross-attention to its map."""

    def __init__(self, width: int, heads: int = HEADS) -> None:
        """
        Args:
            width: D.
            heads: Number of heads; must divide D.
        """
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        # The attention adds nothing at first, so training starts at zero-shot CLIP.
        nn.init.zeros_(self.attention.out_proj.weight)
        nn.init.zeros_(self.attention.out_proj.bias)

    def forward(self, maps: Tensor, text: Tensor) -> Tensor:
        """Return the class texts for every image.

        Args:
            maps: Features of the positions. Shape: [N, P, D].
            text: Text weights of unit length. Shape: [C, D].

        Returns:
            Adapted texts. Shape: [N, C, D].
        """
        # queries: the texts; keys and values: the positions
        queries = text.expand(len(maps), -1, -1)
        return text + self.attention(queries, maps, maps, need_weights=False)[0]


def logits(attention: TextAttention, images: Tensor, maps: Tensor, text: Tensor) -> Tensor:
    """Return VT-CLIP's logits.

    Args:
        attention: Trained network.
        images: Raw features. Shape: [N, D].
        maps: Features of the positions. Shape: [N, P, D].
        text: Text weights of unit length. Shape: [C, D].

    Returns:
        Logits. Shape: [N, C].
    """
    guided = normalize(attention(maps, text), dim=2)
    return SCALE * torch.einsum("nd,ncd->nc", normalize(images, dim=1), guided)


class VTClip(GradientHead):
    """VT-CLIP, trained by SGD; a reconstruction."""

    needs = frozenset({"text", "maps"})
    remark = RECONSTRUCTION
    module: TextAttention | None

    def __init__(
        self,
        *,
        seed: int,
        epochs: int,
        batch: int,
        learning_rate: float,
        weight_decay: float,
        heads: int = HEADS,
        drop_last: bool = False,
    ) -> None:
        """
        Args:
            seed: Seed of initialisation and order of the images.
            epochs: Passes over the shots.
            batch: Images in a step.
            learning_rate: Peak learning rate.
            weight_decay: Weight decay of SGD.
            heads: Number of heads of the attention.
            drop_last: Drop an incomplete last batch, see `Plan`.
        """
        super().__init__(seed=seed, plan=Plan("sgd", epochs, batch, learning_rate, weight_decay, drop_last))
        self.heads = heads

    def build(self) -> nn.Module:
        return TextAttention(self.text.known.shape[1], self.heads)

    def forward(self, pictures: Pictures, text: Text) -> Tensor:
        assert self.module is not None
        return logits(self.module, pictures.images, maps_of(pictures), text.known)
