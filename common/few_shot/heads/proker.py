"""ProKeR (Bendou et al. 2025, arXiv 2501.11175): kernel ridge regression that stays near zero-shot CLIP.

    logits = 100 (x W^T + k(x, S) (K / lmbda + I)^-1 (Y - S W^T)),   k(a, b) = exp(-beta (1 - a b))

x, S: unit-length features of an image and of the shots. W: the text weights. K = k(S, S). Y: labels of the shots,
one-hot. As in the authors' code, from which the default values are, too (means over ImageNet's seeds at 16 shots).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from common.config.schema import positive
from common.few_shot.heads.base import SCALE, Pictures, SolvedHead, Text

BETAS, LMBDAS = (0.5, 3.0, 20), (0.001, 1.0, 10)  # first, last and number of the values that are searched


def kernel(images: Tensor, others: Tensor, beta: float) -> Tensor:
    """Return the Gaussian kernel of unit-length features. Shapes: [N, D], [M, D] -> [N, M]."""
    return torch.exp(-beta * (1 - images @ others.T))


class ProKeR(SolvedHead):
    """ProKeR, its training-free form."""

    values = ("beta", "lmbda")

    def __init__(self, *, seed: int, beta: float, lmbda: float) -> None:
        """
        Args:
            seed: Not used.
            beta: Sharpness of the kernel, if there are no validation images to search it on.
            lmbda: Weight of the correction, likewise.
        """
        super().__init__(seed=seed)
        for name, value in (("beta", beta), ("lmbda", lmbda)):
            positive(f"few_shot.{name}", value)
        self.given = {"beta": beta, "lmbda": lmbda}

    def _solve(self, beta: float, lmbda: float) -> dict[str, Any]:
        shots, weights = normalize(self.train.seen.images, dim=1), self.text.known
        wanted = one_hot(self.train.seen.labels, len(weights)).to(shots)
        system = kernel(shots, shots, beta) / lmbda + torch.eye(len(shots)).to(shots)
        dual = torch.linalg.solve(system, wanted - shots @ weights.T)
        return {"shots": shots, "weights": weights, "dual": dual, "beta": beta, "lmbda": lmbda}

    def step(self, number: int) -> dict[str, float]:
        judged = self.judged
        if judged is None:
            self.solution = self._solve(**{name: (self.followed or self.given)[name] for name in self.values})
        else:
            grid = itertools.product(torch.linspace(*BETAS).tolist(), torch.linspace(*LMBDAS).tolist())

            def right(values: tuple[float, float]) -> int:
                logits = self.solved(judged, self.text, self._solve(*values))
                return int((logits.argmax(1) == judged.labels).sum())

            self.solution = self._solve(*max(grid, key=right))  # of equal pairs the first
        return {}

    def solved(self, pictures: Pictures, text: Text, solution: dict[str, Any]) -> Tensor:
        images = normalize(pictures.images, dim=1)
        correction = kernel(images, solution["shots"], solution["beta"]) @ solution["dual"]
        return SCALE * (images @ solution["weights"].T + correction)
