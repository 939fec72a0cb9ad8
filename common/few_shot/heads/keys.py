"""Keys: what training images are remembered by, and how they vote (Zhang et al. 2022). Tip-Adapter's part of all
learners with a cache, and of the search of their alpha and beta.

    votes = exp(-beta (1 - x K^T)) V

x: an image's feature of length 1. K, the keys: the training images' features. V: their labels, one-hot, so a product
with V is a sum over the images of a class. Keys therefore stand class by class, and a class with fewer images is filled
up with keys that have no vote.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Keys:
    """What training images are remembered by.

    Args:
        values: Shape: [C, K, D].
        missing: True where a class has fewer than K images. Shape: [C, K].
    """

    values: Tensor
    missing: Tensor


def keys_of(views: Tensor, labels: Tensor, classes: int) -> Keys:
    """The keys at the start: the mean of an image's raw features over its views, then of length 1.

    Args:
        views: Raw features. Shape: [V, N, D].
        labels: Shape: [N].
        classes: C.

    Raises:
        ValueError: A class has no image.
    """
    counts = torch.bincount(labels, minlength=classes)
    if empty := (counts == 0).nonzero().flatten().tolist():
        raise ValueError(f"class number {empty[0]} has no training image")
    order = torch.argsort(labels, stable=True)
    first = counts.cumsum(0) - counts
    label = labels[order]
    slot = torch.arange(len(labels), device=labels.device) - first[label]
    values = views.new_zeros(classes, int(counts.max()), views.shape[2])
    values[label, slot] = normalize(views.mean(0), dim=1)[order]
    missing = torch.ones(values.shape[:2], dtype=torch.bool, device=labels.device)
    missing[label, slot] = False
    return Keys(values, missing)


def affinity(images: Tensor, keys: Keys) -> Tensor:
    """Cosine of every image to every key, minus infinity for the missing ones.

    Args:
        images: Raw features. Shape: [N, D].
        keys: Keys of the training images.

    Returns:
        Shape: [N, C, K].
    """
    found = normalize(images, dim=1) @ keys.values.flatten(0, 1).T
    return found.view(len(images), *keys.missing.shape).masked_fill(keys.missing, -torch.inf)


def votes(affinity: Tensor, beta: float) -> Tensor:
    """exp(-beta (1 - affinity)), summed over the keys of a class.

    Args:
        affinity: Shape: [N, C, K].
        beta: How sharply the vote falls with the distance; above 0.

    Returns:
        Shape: [N, C].
    """
    return (affinity - 1).mul_(beta).exp_().sum(-1)
