"""CLAP (Silva-Rodríguez et al. 2024, arXiv 2312.12730): a linear probe that begins at the texts and is held near them.

    logits = 100 cos(x, p_c),   loss = cross entropy + mean_c lambda_c |p_c - t_c|^2

p_c begins at t_c, the mean of the raw features of a class's prompts. lambda_c: the probability that zero-shot CLIP
gives class c for its own shots, in the mean, so that what CLIP knows is held. No validation image is used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from common.few_shot.heads.base import (
    DASSL_CROP,
    GradientHead,
    Pictures,
    Plan,
    Support,
    Text,
    base_logits,
    cosine_logits,
)


class Prototypes(nn.Module):
    """A trainable vector for each class."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values)


def multipliers(zero_shot: Tensor, labels: Tensor) -> Tensor:
    """Return the mean probability of the true class over the shots of each class. Shapes: [N, C], [N] -> [C].

    >>> multipliers(torch.tensor([[0.0, 0.0], [1e3, 0.0], [0.0, 1e3]]), torch.tensor([0, 0, 1])).tolist()
    [0.75, 1.0]
    """
    own = zero_shot.softmax(1).gather(1, labels[:, None])[:, 0]
    sums = own.new_zeros(zero_shot.shape[1]).index_add_(0, labels, own)
    return sums / torch.bincount(labels, minlength=zero_shot.shape[1])


class CLAP(GradientHead):
    """CLAP; the last epoch is kept."""

    crop = DASSL_CROP
    fixed_classes = True
    module: Prototypes | None

    def __init__(
        self,
        *,
        seed: int,
        epochs: int,
        batch: int,
        learning_rate: float,
        weight_decay: float,
        constraint: bool = True,
    ) -> None:
        """
        Args:
            seed: Seed of the order of the images.
            epochs: Passes over the shots.
            batch: Images in a step.
            learning_rate: Peak learning rate.
            weight_decay: Weight decay of SGD.
            constraint: False: the authors' ZS-LP, without the penalty.
        """
        super().__init__(seed=seed, plan=Plan("sgd", epochs, batch, learning_rate, weight_decay))
        self.constraint = constraint

    def build(self) -> nn.Module:
        return Prototypes(self._texts().clone())

    def begin(self, train: Support, val: Pictures | None, text: Text, test: Pictures | None = None) -> None:
        super().begin(train, val, text, test)
        self.held = multipliers(base_logits(train.seen, text), train.seen.labels)

    def _texts(self) -> Tensor:
        """Return the mean of the raw features of each class's prompts. Shape: [C, D]."""
        return torch.stack([each.mean(0) for each in self.text.prompts])

    def penalty(self) -> Tensor | float:
        if not self.constraint:
            return 0.0
        assert self.module is not None
        return (self.held * (self.module.values - self._texts()).square().sum(1)).mean()

    def forward(self, pictures: Pictures, text: Text) -> Tensor:
        assert self.module is not None
        return cosine_logits(pictures.images, normalize(self.module.values, dim=1))

    def shaped_as(self, weights: dict[str, Tensor]) -> nn.Module:
        return Prototypes(weights["values"].clone())
