"""TIMO (Li et al. 2024, arXiv 2412.11375), training-free: images choose among prompts, and prompts join the images.

    logits = alpha x W^T + x M + b

W: text weights in which the prompts that are nearest to the class's shots count most (softmax(gamma m / |m|) of their
cosines m). M, b: Gaussian discriminant analysis of the shots and of the prompts, each times its cosine m. The inverse
covariance is Kubokawa and Srivastava's, D ((N - 1) S + trace(S) I)^-1. As in the authors' code; alpha is searched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.config.schema import positive
from common.few_shot.heads.base import Pictures, SolvedHead, Text

ALPHAS = tuple(10.0**power for power in range(-4, 5))


def guided(prompts: tuple[Tensor, ...], shots: Tensor, gamma: float) -> tuple[Tensor, list[Tensor]]:
    """Return the text weights that the shots guide, and the cosines of each class's prompts to the mean of its shots.

    Args:
        prompts: Prompts of each class, unit length. C tensors of shape [prompts, D].
        shots: Means of the classes' shots, unit length. Shape: [C, D].
        gamma: Sharpness of the choice.

    Returns:
        Weights of unit length, shape [C, D], and C tensors of shape [prompts].
    """
    cosines = [each @ shot for each, shot in zip(prompts, shots, strict=True)]
    shares = [(gamma * each / each.norm()).softmax(0) for each in cosines]
    weights = torch.stack([share @ each for share, each in zip(shares, prompts, strict=True)])
    return normalize(weights, dim=1), cosines


def discriminant(rows: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return weights and biases of Gaussian discriminant analysis with equal priors.

    Shapes: [N, D], [N] -> [D, C], [C].
    """
    counts = torch.bincount(labels, minlength=classes).to(rows)
    means = rows.new_zeros(classes, rows.shape[1]).index_add_(0, labels, rows) / counts[:, None]
    centred, width = rows - means[labels], rows.shape[1]
    covariance = centred.T.cov()
    shrunk = (len(rows) - 1) * covariance + covariance.trace() * torch.eye(width).to(rows)
    weights = width * torch.linalg.pinv(shrunk) @ means.T
    prior = torch.full_like(counts, 1 / classes).log()
    return weights, prior - (means.T * weights).sum(0) / 2


class TIMO(SolvedHead):
    """TIMO. With one prompt for each class, the shots have nothing to choose."""

    values = ("alpha",)

    def __init__(self, *, seed: int, alpha: float, gamma: float, key_views: int) -> None:
        """
        Args:
            seed: Not used.
            alpha: Weight of the texts if there are no validation images to search it on.
            gamma: Sharpness of the choice among prompts.
            key_views: Number of random views of each shot that are analysed.
        """
        super().__init__(seed=seed)
        for name, value in (("alpha", alpha), ("gamma", gamma), ("key_views", key_views)):
            positive(f"few_shot.{name}", value)
        self.alpha, self.gamma, self.key_views = alpha, gamma, key_views

    def step(self, number: int) -> dict[str, float]:
        classes, mean = len(self.text.names), self.train.mean_view(self.key_views)
        keys = normalize(mean.images, dim=1)
        counts = torch.bincount(mean.labels, minlength=classes).to(keys)
        shots = keys.new_zeros(classes, keys.shape[1]).index_add_(0, mean.labels, keys) / counts[:, None]
        prompts = tuple(normalize(each, dim=1) for each in self.text.prompts)
        weights, cosines = guided(prompts, normalize(shots, dim=1), self.gamma)
        seen = [self.train.view(view) for view in range(self.train.limited(self.key_views))]
        rows = [each * near[:, None] for each, near in zip(prompts, cosines, strict=True)]
        rows += [normalize(each.images, dim=1) for each in seen]
        labels = [torch.full((len(each),), number).to(mean.labels) for number, each in enumerate(prompts)]
        matrix, bias = discriminant(torch.cat(rows), torch.cat([*labels, *(each.labels for each in seen)]), classes)
        given = self.alpha if self.followed is None else self.followed["alpha"]
        self.solution = solution = {"weights": weights, "matrix": matrix, "bias": bias, "alpha": given}
        judged = self.judged
        if judged is not None:

            def right(alpha: float) -> int:
                found = self.solved(judged, self.text, solution | {"alpha": alpha})
                return int((found.argmax(1) == judged.labels).sum())

            solution["alpha"] = max(ALPHAS, key=right)  # of equal ones the first
        return {}

    def solved(self, pictures: Pictures, text: Text, solution: dict[str, Any]) -> Tensor:
        images = normalize(pictures.images, dim=1)
        return solution["alpha"] * images @ solution["weights"].T + images @ solution["matrix"] + solution["bias"]
