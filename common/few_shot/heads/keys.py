"""Keys: cached features of training images, and the votes that they give (Zhang et al. 2022).

    votes = exp(-beta (1 - x K^T)) V

x: an image's feature of unit length. K, the keys: the training images' features. V: their labels, one-hot, so a product
with V is a sum over the images of a class. Keys are therefore stored class by class, and a class with fewer images is
padded with keys that have no vote. All learners with a cache use this, and so does the search of their alpha and beta.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Keys:
    """Keys of the training images, class by class.

    Args: values: Features of unit length, 0 where missing. Shape: [C, K, D].
    missing: True where a class has fewer than K images. Shape: [C, K].
    """

    values: Tensor
    missing: Tensor


def keys_of(views: Tensor, labels: Tensor, classes: int) -> Keys:
    """Build the initial keys: an image's raw features averaged over its views, then normalised.

    Args:
        views: Raw features of every view. Shape: [V, N, D].
        labels: Class indices. Shape: [N].
        classes: C.

    Raises:
        ValueError: A class has no image.
    """
    counts = torch.bincount(labels, minlength=classes)
    if empty := (counts == 0).nonzero().flatten().tolist():
        raise ValueError(f"class number {empty[0]} has no training image")
    # Sort the images by label; slot: the place of an image among those of its class.
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
    """Return the cosine of every image to every key, minus infinity for missing keys.

    Args:
        images: Raw features. Shape: [N, D].
        keys: Keys of the training images.

    Returns:
        Cosines. Shape: [N, C, K].
    """
    found = normalize(images, dim=1) @ keys.values.flatten(0, 1).T
    # exp(-inf) = 0, so missing keys give no vote.
    # shape[0], not len(): an exported model takes any number of images
    return found.view(images.shape[0], *keys.missing.shape).masked_fill(keys.missing, -torch.inf)


def votes(affinity: Tensor, beta: float) -> Tensor:
    """Return exp(-beta (1 - affinity)), summed over the keys of a class.

    Args:
        affinity: Cosines to the keys. Shape: [N, C, K].
        beta: Sharpness: the decay of a vote with the distance; above 0.

    Returns:
        Votes. Shape: [N, C].
    """
    # In place after the first subtraction: [N, C, K] is the largest tensor of a fit.
    return (affinity - 1).mul_(beta).exp_().sum(-1)
