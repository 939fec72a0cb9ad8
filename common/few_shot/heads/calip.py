"""CALIP (Guo et al. 2023): parameter-free attention between text and image features, as in the authors' code.

    A = 2 F W^T; F: the positions of an image's map, each of unit length; W: the text weights
    logits = 100 (b1 x W^T + b2 x (softmax over positions(A)^T F)^T + b3 pool(softmax over classes(A) W) W^T)

pool: mean plus maximum over the positions. The outputs of attention are not normalised again. By the paper A could be
divided by 2; the code multiplies.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from common.few_shot.heads.base import SCALE, FewShotHead, Pictures, Text, maps_of
from common.types import UserError

SHARPNESS = 2.0
BETAS = (1.0, 1.12, 0.02)  # ImageNet, RN50, as others read the paper; the public configuration is for RN101


def terms(images: Tensor, maps: Tensor, text: Tensor, sharpness: float = SHARPNESS) -> tuple[Tensor, Tensor, Tensor]:
    """Return CALIP's three logits before they are weighted and scaled.

    Args:
        images: Raw features. Shape: [N, D].
        maps: Features of the positions, raw. Shape: [N, P, D].
        text: Text weights of unit length. Shape: [C, D].
        sharpness: Factor of the cosines before the softmax.

    Returns:
        Global logits, logits with the map as the texts attend to it, logits with the texts as the map attends to them.
        Shape of each: [N, C].
    """
    image, positions = normalize(images, dim=1), normalize(maps, dim=2)
    attention = sharpness * positions @ text.T
    # [N, P, C] attention: over the positions for every class, [N, C, D]; over the classes for every position, [N, P, D]
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
    """Return CALIP's logits.

    Args:
        images: Raw features. Shape: [N, D].
        maps: Features of the positions, raw. Shape: [N, P, D].
        text: Text weights of unit length. Shape: [C, D].
        betas: Weights of the three terms; (1, 0, 0) is zero-shot CLIP.
        sharpness: Factor of the cosines before the softmax.

    Returns:
        Logits. Shape: [N, C].
    """
    return weighed(terms(images, maps, text, sharpness), betas)


def weighed(terms: tuple[Tensor, Tensor, Tensor], betas: tuple[float, float, float]) -> Tensor:
    """Return the weighted sum of the three terms, scaled. Shape: [N, C]."""
    return SCALE * (betas[0] * terms[0] + betas[1] * terms[1] + betas[2] * terms[2])


def three(betas: list[float]) -> tuple[float, float, float]:
    """Check that there are three weights, one for each term of CALIP."""
    if len(betas) != 3:
        raise UserError(f"few_shot.betas={betas} must be three numbers, one for each term")
    return betas[0], betas[1], betas[2]


class Calip(FewShotHead):
    """CALIP: attention between text and image features, without parameters."""

    needs = frozenset({"text", "maps"})

    def __init__(self, *, seed: int, betas: list[float], sharpness: float = SHARPNESS) -> None:
        """
        Args:
            seed: Not used.
            betas: Weights of the three terms.
            sharpness: Factor of the cosines before the softmax.
        """
        super().__init__(seed=seed)
        self.betas, self.sharpness = three(betas), sharpness

    def logits(self, pictures: Pictures, text: Text) -> Tensor:
        return logits(pictures.images, maps_of(pictures), text.known, self.betas, self.sharpness)
