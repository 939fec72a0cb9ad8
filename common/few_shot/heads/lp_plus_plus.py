"""LP++ (Huang et al. 2024, arXiv 2404.02285): a linear probe to which each class adds its text, by a learnt weight.

    logit_c = w_c x + b_c + alpha_c (x t_c)

x: an image's feature of unit length. t_c: a class's text weights. Full-batch descent with step sizes from the data, so
nothing is tuned: 4 N / (largest eigenvalue of X^T X) for w and b, N / (4 max_c sum_i (x_i t_c)^2) for alpha.
As in the authors' code, which departs from the paper in two points: w begins at the sums of the classes' features, not
their means, and the gradient of alpha, which moves every ten epochs, is the sum over all epochs so far.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from common.config.schema import positive
from common.few_shot.heads.base import FewShotHead, Pictures, Support, Text, accuracy, base_logits

MOMENTUM = 0.9  # of w and b
ALPHA_EVERY = 10  # epochs from one step of alpha to the next
ALPHA_SCALE = 250.0  # of the initial alpha, in the mean cosine of the shots to their classes' texts
TRAINED = ("weight", "bias", "alpha")


def logits(images: Tensor, text: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor) -> Tensor:
    """Return LP++'s logits. Shape: [N, C].

    Args:
        images: Raw features. Shape: [N, D].
        text: Text weights of unit length. Shape: [C, D].
        weight: Weights of the probe. Shape: [C, D].
        bias: Biases. Shape: [C].
        alpha: Weight of each class's text. Shape: [C].
    """
    images = normalize(images, dim=1)
    return images @ weight.T + bias + alpha * (images @ text.T)


class LPPlusPlus(FewShotHead):
    """LP++; with validation images the best epoch is kept. One step is one epoch."""

    fixed_classes = True

    def __init__(self, *, seed: int, epochs: int) -> None:
        """
        Args:
            seed: Not used: there is nothing random.
            epochs: Steps of full-batch descent.
        """
        super().__init__(seed=seed)
        positive("few_shot.epochs", epochs)
        self.steps = epochs
        self.values: dict[str, Tensor] = {}  # those of TRAINED; while it is fitted also their momentum and gradients
        self.chosen: tuple[float, int, dict[str, Tensor]] | None = None  # accuracy, epoch, values

    def begin(self, train: Support, val: Pictures | None, text: Text, test: Pictures | None = None) -> None:
        super().begin(train, val, text, test)
        shots, labels, texts = normalize(train.seen.images, dim=1), train.seen.labels, text.known
        similar = shots @ texts.T
        counts = torch.bincount(labels, minlength=len(texts)).to(shots)
        own = shots.new_zeros(len(texts)).index_add_(0, labels, similar.gather(1, labels[:, None])[:, 0]) / counts
        weight = torch.zeros_like(texts).index_add_(0, labels, shots)
        self.values = {
            "weight": weight,
            "bias": shots.new_zeros(len(texts)),
            "alpha": (ALPHA_SCALE * own.mean()).expand(len(texts)).clone(),
            "weight_momentum": torch.zeros_like(weight),
            "bias_momentum": shots.new_zeros(len(texts)),
            "alpha_gradient": shots.new_zeros(len(texts)),
        }
        self.rate = float(4 * len(shots) / torch.linalg.eigvalsh(shots.T @ shots)[-1])
        self.alpha_rate = float(len(shots) / (4 * similar.square().sum(0).max()))

    @property
    def chosen_by_test(self) -> bool:
        return self.test is not None

    def step(self, number: int) -> dict[str, float]:
        values, seen = self.values, self.train.seen
        trained = {name: values[name].requires_grad_() for name in TRAINED}
        found = logits(seen.images, self.text.known, **trained)
        loss = cross_entropy(found, seen.labels)
        gradients = dict(zip(TRAINED, torch.autograd.grad(loss, list(trained.values())), strict=True))
        with torch.no_grad():
            for name in ("weight", "bias"):
                values[f"{name}_momentum"].mul_(MOMENTUM).add_(gradients[name])
                values[name] = values[name].detach() - self.rate * values[f"{name}_momentum"]
            values["alpha_gradient"] += gradients["alpha"]
            values["alpha"] = values["alpha"].detach()
            if (number + 1) % ALPHA_EVERY == 0:
                values["alpha"] = values["alpha"] - self.alpha_rate * values["alpha_gradient"]
        metrics = {
            "loss": float(loss.detach()),
            "train/accuracy": float((found.argmax(1) == seen.labels).float().mean()),
        }
        if self.judges is not None:
            metrics["selection/accuracy"] = right = accuracy(self, self.judges, self.text)
            if self.chosen is None or right > self.chosen[0]:  # of equal epochs the first
                self.chosen = right, number, {name: values[name].clone() for name in TRAINED}
        return metrics

    def end(self) -> dict[str, Any]:
        if self.chosen is None:
            return {}
        self.values |= self.chosen[2]
        return {"epoch": self.chosen[1] + 1, "selection_accuracy": self.chosen[0]}

    def logits(self, pictures: Pictures, text: Text) -> Tensor:
        if not self.values:
            return base_logits(pictures, text)
        return logits(pictures.images, text.known, **{name: self.values[name] for name in TRAINED})

    def head(self) -> dict[str, Any]:
        return {name: self.values[name] for name in TRAINED}

    def ready(self, head: dict[str, Any], text: Text) -> None:
        super().ready(head, text)
        self.values = dict(head)

    def state(self) -> dict[str, Any]:
        return {"values": self.values, "chosen": self.chosen}

    def restore(self, state: dict[str, Any]) -> None:
        self.values, self.chosen = dict(state["values"]), state["chosen"]
