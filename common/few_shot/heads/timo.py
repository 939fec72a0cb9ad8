"""TIMO (Li et al. 2024, arXiv 2412.11375), training-free: images choose among prompts, and prompts join the images.

    logits = alpha x W^T + x M + b

W: text weights in which the prompts that are nearest to the class's shots count most (softmax(gamma m / |m|) of their
cosines m). M, b: Gaussian discriminant analysis of the shots and of the prompts, each times its cosine m. The inverse
covariance is Kubokawa and Srivastava's, D ((N - 1) S + trace(S) I)^-1. As in the authors' code; alpha is searched.
TIMO-S also searches gamma, by the text weights alone, and how many prompts join: the nearest first, each at most twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.config.schema import positive
from common.few_shot.heads.base import Pictures, SolvedHead, Text, cosine_logits

ALPHAS = tuple(10.0**power for power in range(-4, 5))
GAMMAS = tuple(range(5, 101, 5))  # of TIMO-S
COUNTS = 10  # numbers of prompts that TIMO-S tries, evenly from 1 to twice all


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


def nearest(prompts: Tensor, cosines: Tensor, count: int | None) -> Tensor:
    """Return a class's prompts, each times its cosine, the nearest to its shots first; after the last they come again.

    Args:
        prompts: Shape: [prompts, D].
        cosines: Those of the prompts to the mean of the shots. Shape: [prompts].
        count: Number of prompts to take, at most twice all; None: each once.
    """
    order = cosines.argsort(descending=True, stable=True)
    order = order if count is None else order.repeat(2)[:count]
    return prompts[order] * cosines[order, None]


def hits(pictures: Pictures, logits: Tensor) -> int:
    """Return how many images have their highest logit at their label."""
    return int((logits.argmax(1) == pictures.labels).sum())


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

    def __init__(self, *, seed: int, alpha: float, gamma: float, key_views: int, search_prompts: bool = False) -> None:
        """
        Args:
            seed: Not used.
            alpha: Weight of the texts if there are no validation images to search it on.
            gamma: Sharpness of the choice among prompts.
            key_views: Number of random views of each shot that are analysed.
            search_prompts: TIMO-S: search gamma and the number of prompts, too, if there are validation images.
        """
        super().__init__(seed=seed)
        for name, value in (("alpha", alpha), ("gamma", gamma), ("key_views", key_views)):
            positive(f"few_shot.{name}", value)
        self.alpha, self.gamma, self.key_views, self.search_prompts = alpha, gamma, key_views, search_prompts
        self.values = ("alpha", "gamma", "prompts") if search_prompts else ("alpha",)

    def step(self, number: int) -> dict[str, float]:
        classes, mean = len(self.text.names), self.train.mean_view(self.key_views)
        keys = normalize(mean.images, dim=1)
        sizes = torch.bincount(mean.labels, minlength=classes).to(keys)
        shots = keys.new_zeros(classes, keys.shape[1]).index_add_(0, mean.labels, keys) / sizes[:, None]
        shots, prompts = normalize(shots, dim=1), tuple(normalize(each, dim=1) for each in self.text.prompts)
        seen = [self.train.view(view) for view in range(self.train.limited(self.key_views))]
        images = [normalize(each.images, dim=1) for each in seen]

        # What is not searched: the values of a finished fit, or those that were given.
        value = {"alpha": self.alpha, "gamma": self.gamma, "prompts": None, **(self.followed or {})}
        judged, gamma, counts, alphas = self.judged, value["gamma"], [value["prompts"]], [value["alpha"]]
        if judged is not None:
            alphas = list(ALPHAS)
            if self.search_prompts:
                tried = {each: cosine_logits(judged.images, guided(prompts, shots, each)[0]) for each in GAMMAS}
                gamma = max(GAMMAS, key=lambda each: hits(judged, tried[each]))
                most = 2 * max(map(len, prompts))
                counts = list(dict.fromkeys(torch.linspace(1, most, COUNTS).int().tolist()))
        weights, cosines = guided(prompts, shots, gamma)
        best = -1
        for count in counts:
            joined = [nearest(each, near, count) for each, near in zip(prompts, cosines, strict=True)]
            named = [torch.full((len(each),), label).to(mean.labels) for label, each in enumerate(joined)]
            rows, labels = torch.cat([*joined, *images]), torch.cat([*named, *(each.labels for each in seen)])
            matrix, bias = discriminant(rows, labels, classes)
            for alpha in alphas:
                found = {"weights": weights, "matrix": matrix, "bias": bias}
                found |= {"alpha": alpha, "gamma": gamma, "prompts": count}
                right = 0 if judged is None else hits(judged, self.solved(judged, self.text, found))
                if right > best:  # of equal ones the first
                    best, self.solution = right, found
        return {}

    def solved(self, pictures: Pictures, text: Text, solution: dict[str, Any]) -> Tensor:
        images = normalize(pictures.images, dim=1)
        return solution["alpha"] * images @ solution["weights"].T + images @ solution["matrix"] + solution["bias"]
