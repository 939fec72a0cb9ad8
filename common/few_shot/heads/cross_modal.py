"""Cross-Modal linear probing (Lin et al. 2023, arXiv 2301.06267): texts are further training examples of a linear head.

    logits = 100 x W^T

x: a feature of unit length, of an image or, while W is trained, of a prompt. W begins at the text weights, and half of
every batch are prompts. With `wise_ft` W is mixed with the text weights at the end (Wortsman et al. 2022).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from common.config.schema import positive
from common.few_shot.heads.base import SCALE, GradientHead, Pictures, Plan, Text, descend
from common.types import UserError

PER_STEP = 100  # iterations between two looks at the validation images, as in the authors' code
WARM_UP, WARM_FROM = 50, 1e-5  # iterations of the linear warm-up, and the rate that it begins at


class CrossModal(GradientHead):
    """Cross-Modal linear probing; with validation images the best step is kept. One step is PER_STEP iterations."""

    fixed_classes = True
    best = True

    def __init__(
        self,
        *,
        seed: int,
        iterations: int,
        batch: int,
        learning_rate: float,
        weight_decay: float,
        wise_ft: float = 0.0,
    ) -> None:
        """
        Args:
            seed: Seed of the batches.
            iterations: Updates, rounded up to whole steps.
            batch: Examples in an update, half of them prompts.
            learning_rate: Peak learning rate; it falls along a cosine by iteration.
            weight_decay: Weight decay of AdamW.
            wise_ft: Share of the text weights in the final ones.
        """
        positive("few_shot.iterations", iterations)
        super().__init__(seed=seed, plan=Plan("adamw", -(-iterations // PER_STEP), batch, learning_rate, weight_decay))
        if batch < 2:
            raise UserError(f"few_shot.batch={batch} must be 2 or more: half of a batch are prompts")
        if not 0 <= wise_ft <= 1:
            raise UserError(f"few_shot.wise_ft={wise_ft} must be a share between 0 and 1")
        self.wise_ft = wise_ft

    def build(self) -> nn.Module:
        return _linear(self.text.known)

    def forward(self, pictures: Pictures, text: Text) -> Tensor:
        assert self.module is not None
        return SCALE * self.module(normalize(pictures.images, dim=1))

    @property
    def chosen_by_test(self) -> bool:
        return self.test is not None

    def rate(self, iteration: int) -> float:
        """Return the learning rate of an iteration, counted from 0."""
        if iteration < WARM_UP:
            return WARM_FROM + (self.plan.learning_rate - WARM_FROM) * iteration / WARM_UP
        return self.plan.rate(0, iteration, self.steps * PER_STEP)

    def step(self, number: int) -> dict[str, float]:
        prompts = torch.cat(self.text.prompts)
        of_prompts = torch.repeat_interleave(
            torch.arange(len(self.text.names)), torch.tensor([len(each) for each in self.text.prompts])
        ).to(prompts.device)
        seen, half, losses, right = self.pictures(self.train, number), self.plan.batch // 2, list[float](), 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        for iteration in range(number * PER_STEP, (number + 1) * PER_STEP):
            chosen, said = (
                torch.randint(size, (count,), generator=generator).to(prompts.device)
                for size, count in ((len(seen), self.plan.batch - half), (len(prompts), half))
            )
            features = torch.cat([seen.images[chosen], prompts[said]])
            labels = torch.cat([seen.labels[chosen], of_prompts[said]])
            logits = self.forward(Pictures(features, labels), self.text)
            loss, hits = descend(self.optimizer, logits, labels, self.rate(iteration))
            losses.append(loss)
            right += hits
        metrics = {"loss": sum(losses) / PER_STEP, "train/accuracy": right / (PER_STEP * self.plan.batch)}
        if self.judges is not None:
            metrics["selection/accuracy"] = self._keep_best(number)
        return metrics

    def end(self) -> dict[str, Any]:
        facts = super().end()
        assert isinstance(self.module, nn.Linear)
        with torch.no_grad():
            self.module.weight.lerp_(self.text.known, self.wise_ft)
        return facts

    def shaped_as(self, weights: dict[str, Tensor]) -> nn.Module:
        return _linear(weights["weight"])


def _linear(weights: Tensor) -> nn.Linear:
    made = nn.Linear(weights.shape[1], weights.shape[0], bias=False, device=weights.device, dtype=weights.dtype)
    made.weight.data.copy_(weights)
    return made
