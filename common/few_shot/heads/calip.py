"""CALIP (Guo et al. 2023): text and image look at each other without a parameter. As the authors' code.

    A = 2 F W^T; F: the positions of an image's map, each of length 1; W: the text weights
    logits = 100 (b1 x W^T + b2 x (softmax over positions(A)^T F)^T + b3 pool(softmax over classes(A) W) W^T)

pool: mean plus maximum over the positions. What attention makes is not of length 1, and stays so. Readers of the paper
divide A by 2; the code multiplies.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from common.few_shot.heads.base import SCALE, FewShotHead, Pictures, Text, maps_of
from common.types import UserError

SHARPNESS = 2.0
BETAS = (1.0, 1.12, 0.02)  # of ImageNet and RN50, as others read the paper; the public configuration is RN101's


def terms(images: Tensor, maps: Tensor, text: Tensor, sharpness: float = SHARPNESS) -> tuple[Tensor, Tensor, Tensor]:
    """The three logits before they are weighed and scaled.

    Args:
        images: Raw features. Shape: [N, D].
        maps: Features of the positions, raw. Shape: [N, P, D].
        text: Text weights, of length 1. Shape: [C, D].
        sharpness: What the cosines are multiplied by before the softmax.

    Returns:
        Global, with the attended text side, with the attended visual side. Shape of each: [N, C].
    """
    image, positions = normalize(images, dim=1), normalize(maps, dim=2)
    attention = sharpness * positions @ text.T
    seen_by_text = attention.softmax(1).transpose(1, 2) @ positions
    seen_by_image = attention.softmax(2) @ text
    pooled = seen_by_image.mean(1) + seen_by_image.amax(1)
    return image @ text.T, (seen_by_text @ image[:, :, None]).squeeze(2), pooled @ text.T


def logits(
    images: Tensor,
    maps: Tensor,
    text: Tensor,
    betas: tuple[float, float, float] = BETAS,
    sharpness: float = SHARPNESS,
) -> Tensor:
    """
    Args:
        images: Raw features. Shape: [N, D].
        maps: Features of the positions, raw. Shape: [N, P, D].
        text: Text weights, of length 1. Shape: [C, D].
        betas: Weights of the three terms; (1, 0, 0) is zero-shot CLIP.
        sharpness: See `terms`.

    Returns:
        Shape: [N, C].
    """
    return weighed(terms(images, maps, text, sharpness), betas)


def weighed(terms: tuple[Tensor, Tensor, Tensor], betas: tuple[float, float, float]) -> Tensor:
    """The three terms times `betas`, added and scaled. Shape: [N, C]."""
    return SCALE * (betas[0] * terms[0] + betas[1] * terms[1] + betas[2] * terms[2])


def three(betas: list[float]) -> tuple[float, float, float]:
    """The weights of CALIP's terms."""
    if len(betas) != 3:
        raise UserError(f"few_shot.betas={betas} must be three numbers, one for each term")
    return betas[0], betas[1], betas[2]


class Calip(FewShotHead):
    """CALIP, without parameters."""

    needs = frozenset({"text", "maps"})

    def __init__(self, *, seed: int, betas: list[float], sharpness: float = SHARPNESS) -> None:
        """
        Args:
            seed: Not used.
            betas: Weights of the three terms.
            sharpness: See `terms`.
        """
        super().__init__(seed=seed)
        self.betas, self.sharpness = three(betas), sharpness

    def logits(self, pictures: Pictures, text: Text) -> Tensor:
        return logits(pictures.images, maps_of(pictures), text.known, self.betas, self.sharpness)
