"""What one update measures about itself, under TRL's names.

Shapes: T tokens of one forward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from common.runtime.distributed import gather
from common.training.grpo.loss import LossInputs, LossOutputs

GAP = "sampling/sampling_logp_difference"


class Measured:
    """Sums over the forwards of one update, and their means over all ranks under TRL's names."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.means: dict[str, tuple[float, float]] = {}
        self.lowest: dict[str, float] = {}
        self.highest: dict[str, float] = {}

    def add(
        self, inputs: LossInputs, outputs: LossOutputs, entropy: torch.Tensor, gap: torch.Tensor | None, first: bool
    ) -> None:
        """One forward.

        `gap` [T]: the trainer's log-probability of each token minus the sampler's; None if they are of different
        distributions.
        """
        self.loss += float(outputs.loss.detach())
        counted = inputs.weights[inputs.owner] > 0
        means = dict(outputs.means)
        means["entropy"] = (float(entropy[counted].sum()), float(counted.sum()))
        if first and bool(counted.any()):
            if gap is not None:
                distance = gap[counted].abs()
                means[f"{GAP}/mean"] = (float(distance.sum()), float(counted.sum()))
                self._extreme(self.highest, f"{GAP}/max", float(distance.max()), max)
            ratio = inputs.correction
            if ratio is not None:
                ratio = ratio[counted]
                means["sampling/importance_sampling_ratio/mean"] = (float(ratio.sum()), float(counted.sum()))
                self._extreme(self.lowest, "sampling/importance_sampling_ratio/min", float(ratio.min()), min)
                self._extreme(self.highest, "sampling/importance_sampling_ratio/max", float(ratio.max()), max)
        for name, (total, count) in means.items():
            before = self.means.get(name, (0.0, 0.0))
            self.means[name] = before[0] + total, before[1] + count
        if outputs.lowest is not None and outputs.highest is not None:
            self._extreme(self.lowest, "clip_ratio/low_min", outputs.lowest, min)
            self._extreme(self.highest, "clip_ratio/high_max", outputs.highest, max)

    def tokens(self, plain: int, computed: int) -> None:
        """Tokens that the plain layout would have computed, padding aside, and those that were."""
        before = self.means.get("shared_prefix/token_ratio", (0.0, 0.0))
        self.means["shared_prefix/token_ratio"] = before[0] + plain, before[1] + computed

    @staticmethod
    def _extreme(values: dict[str, float], name: str, value: float, choose: Callable[[float, float], float]) -> None:
        values[name] = choose(values.get(name, value), value)

    def over_ranks(self) -> dict[str, float]:
        """All ranks call it together; a rank may have had no group to learn from."""
        parts = gather(self)
        metrics = {"loss": sum(part.loss for part in parts)}
        for name in sorted({name for part in parts for name in part.means}):
            pairs = [part.means.get(name, (0.0, 0.0)) for part in parts]
            metrics[name] = sum(total for total, _ in pairs) / (sum(count for _, count in pairs) or 1.0)
        for kind, choose in (("lowest", min), ("highest", max)):
            for name in sorted({name for part in parts for name in getattr(part, kind)}):
                metrics[name] = choose(getattr(part, kind)[name] for part in parts if name in getattr(part, kind))
        return metrics
