"""Tip-Adapter and Tip-Adapter-F (Zhang et al. 2022): zero-shot CLIP plus votes of the training images that are alike.

    logits = 100 x W^T + alpha exp(-beta (1 - x K^T)) V

x: an image's feature of length 1. W: the text weights. K, the keys: the training images' features. V: their labels,
one-hot, so a product with V is a sum over the images of a class. Keys therefore stand class by class, and a class with
fewer images is filled up with keys that have no vote. As the authors' code (their first preprint swaps alpha and beta).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

STEPS = (200, 20)  # of beta and alpha


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
        keys: Of the training images.

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


def logits(images: Tensor, keys: Keys, zero_shot: Tensor, alpha: float, beta: float) -> Tensor:
    """
    Args:
        images: Raw features. Shape: [N, D].
        keys: Of the training images.
        zero_shot: Logits of the images. Shape: [N, C].
        alpha: Weight of the votes; 0 leaves zero-shot CLIP.
        beta: How sharply a vote falls with the distance.

    Returns:
        Shape: [N, C].
    """
    return zero_shot + alpha * votes(affinity(images, keys), beta)


def grid(scale: tuple[float, float], steps: tuple[int, int] = STEPS) -> tuple[list[float], list[float]]:
    """The betas and alphas that are tried: evenly from 0.1 towards `scale`, which is not reached itself.

    Args:
        scale: Ends of beta and alpha.
        steps: How many betas and alphas.

    >>> grid((2.1, 1.1), (2, 2))
    ([0.1, 1.1], [0.1, 0.6])
    """
    betas, alphas = (
        [i * (end - 0.1) / count + 0.1 for i in range(count)] for end, count in zip(scale, steps, strict=True)
    )
    return betas, alphas


@dataclass(frozen=True)
class Found:
    """Of a search: the best pair and its accuracy."""

    alpha: float
    beta: float
    accuracy: float


def search(
    vote: Callable[[slice], Callable[[float], Tensor]],
    zero_shot: Tensor,
    labels: Tensor,
    scale: tuple[float, float],
    steps: tuple[int, int] = STEPS,
    chunk: int = 512,
) -> Found:
    """The pair of the highest accuracy; of equal ones the first, beta outside and alpha inside, as the authors search.

    Accuracies of all pairs are counted chunk by chunk, so that the images' affinities are never held together, and one
    exponential per beta serves all alphas.

    Args:
        vote: From some images to a function from beta to what alpha multiplies. Shape of that: [images, C].
        zero_shot: Logits of the images. Shape: [N, C].
        labels: Shape: [N].
        scale: Ends of beta and alpha.
        steps: How many betas and alphas.
        chunk: Images that are held together.
    """
    betas, alphas = grid(scale, steps)
    right = torch.zeros(len(betas), len(alphas), dtype=torch.long, device=labels.device)
    for start in range(0, len(labels), chunk):
        part = slice(start, start + chunk)
        base, truth, voted = zero_shot[part], labels[part], vote(part)
        mixed = torch.empty_like(base)
        for row, beta in enumerate(betas):
            added = voted(beta)
            for column, alpha in enumerate(alphas):
                torch.add(base, added, alpha=alpha, out=mixed)
                right[row, column] += (mixed.argmax(1) == truth).sum()
    best = int(right.flatten().argmax())  # of equal ones the first
    return Found(alphas[best % len(alphas)], betas[best // len(alphas)], float(right.flatten()[best]) / len(labels))
