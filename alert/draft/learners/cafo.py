"""CaFo (Zhang et al. 2023): two caches, one of CLIP's and one of DINO's features, weighed for each image by how well
they agree with zero-shot CLIP. As the authors' code; their equation 9 has no alpha.

    logits = p_zs + alpha (w_clip z(p_clip) + w_dino z(p_dino))
    p = exp(-beta (1 - x K^T)) V, see `tip_adapter`; z: over the classes of an image, mean 0 and variance 1
    w = softmax of the sums over the classes of z(p) z(p_zs)

The sum is C - 1 times a correlation, so with many classes the weights are nearly 0 and 1.
"""

from __future__ import annotations

from torch import Tensor


def standardized(logits: Tensor) -> Tensor:
    """(p - mean) / standard deviation over the classes, the last dimension, with C - 1 in the variance."""
    return (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True)


def weights(standard: Tensor, zero_shot: Tensor) -> Tensor:
    """How much each cache counts for an image: they add up to 1, and gradients flow through them.

    Args:
        standard: Standardised votes of the caches. Shape: [caches, N, C].
        zero_shot: Shape: [N, C].

    Returns:
        Shape: [caches, N].
    """
    return (standard * standardized(zero_shot)).sum(2).softmax(0)


def fused(votes: Tensor, zero_shot: Tensor) -> Tensor:
    """What alpha multiplies: the standardised votes, weighed. Shapes as of `logits`."""
    standard = standardized(votes)
    return (weights(standard, zero_shot)[:, :, None] * standard).sum(0)


def logits(votes: Tensor, zero_shot: Tensor, alpha: float) -> Tensor:
    """
    Args:
        votes: Of the caches at one beta. Shape: [caches, N, C].
        zero_shot: Raw logits. Shape: [N, C].
        alpha: 0 leaves zero-shot CLIP.

    Returns:
        Shape: [N, C].
    """
    return zero_shot + alpha * fused(votes, zero_shot)
