"""Other losses and advantages, by `trainer.loss` and `trainer.advantages`, with their values in `..._options`.

    trainer.loss=common.training.grpo.variants.cispo +trainer.loss_options.cap=5
    trainer.loss=common.training.grpo.variants.sapo
    trainer.advantages=common.training.grpo.variants.rloo                                              or mrn
    trainer.advantages=common.training.grpo.variants.pass_at_k +trainer.advantages_options='{k: 2, correct_from: 2}'

While every rollout batch is used for one update, the ratio is 1, and CISPO and SAPO have GRPO's gradient: they matter
with `num_iterations` or `steps_per_rollout` above 1, or with samples of older weights.
"""

from __future__ import annotations

from math import comb

import torch

from common.config.schema import GRPOConfig
from common.training.grpo.loss import EPSILON, LossInputs, LossOutputs, policy_loss
from common.types import UserError


def cispo(inputs: LossInputs, config: GRPOConfig, cap: float = 5.0) -> LossOutputs:
    """CISPO (MiniMax-M1, arXiv 2506.13585, equation 4): no token loses its gradient, but the ratio is held below `cap`.

        - min(ratio, cap) A log p,   without a gradient through the ratio

    `epsilon` has no effect. TRL calls `cap` epsilon_high.
    """

    def surrogate(
        ratio: torch.Tensor, advantage: torch.Tensor, logps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        held = (ratio > cap) & (advantage > 0)
        return -ratio.clamp(max=cap).detach() * advantage * logps, torch.zeros_like(held), held

    return policy_loss(inputs, surrogate, config.beta, config.importance_sampling_level, config.use_bias_correction_kl)


def sapo(
    inputs: LossInputs, config: GRPOConfig, temperature_pos: float = 1.0, temperature_neg: float = 1.05
) -> LossOutputs:
    """SAPO (arXiv 2511.20347): a sigmoid around ratio 1 in place of clipping, steeper for negative advantages.

        - 4 / t sigmoid(t (ratio - 1)) A

    `epsilon` has no effect. The slope at ratio 1 is 1, as GRPO's.
    """

    def surrogate(
        ratio: torch.Tensor, advantage: torch.Tensor, logps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        steepness = torch.where(advantage > 0, temperature_pos, temperature_neg)
        never = torch.zeros_like(advantage, dtype=torch.bool)
        return -4 / steepness * torch.sigmoid(steepness * (ratio - 1)) * advantage, never, never

    return policy_loss(inputs, surrogate, config.beta, config.importance_sampling_level, config.use_bias_correction_kl)


def mrn(parts: torch.Tensor, weights: torch.Tensor, config: GRPOConfig) -> torch.Tensor:
    """Multi-reward normalisation (ReFine-RFT, arXiv 2601.06993): a weighted sum of rewards normalised in their groups.

    GDPO (`multi_objective_aggregation=normalize_then_sum`) without its last step over the update.
    Shapes: [K, N, G], [K] -> [N, G].
    """
    each = (parts - parts.mean(2, keepdim=True)) / (parts.std(2, keepdim=True) + EPSILON)
    return (each * weights[:, None, None]).sum(0)


def rloo(parts: torch.Tensor, weights: torch.Tensor, config: GRPOConfig) -> torch.Tensor:
    """RLOO (arXiv 2402.14740): the reward less the mean reward of the group's other completions, not scaled.

    Shapes: [K, N, G], [K] -> [N, G].

    >>> rloo(torch.tensor([[[3.0, 0.0, 0.0, 0.0, 0.0]]]), torch.ones(1), None).round(decimals=4).tolist()
    [[3.0, -0.75, -0.75, -0.75, -0.75]]
    """
    total = (parts * weights[:, None, None]).sum(0)
    size = total.shape[1]
    return (total - total.mean(1, keepdim=True)) * size / (size - 1)


def pass_at_k(
    parts: torch.Tensor, weights: torch.Tensor, config: GRPOConfig, k: int, correct_from: float
) -> torch.Tensor:
    """Pass@k training (arXiv 2508.10751, section 2.3): advantages of the best of k completions, in expectation.

    A group of n completions with w wrong ones has the mean M = 1 - C(w, k) / C(n, k) over all choices of k, and the
    deviation S = sqrt(M (1 - M)). The advantage of a right completion is (1 - M) / S, that of a wrong one
    (1 - M - C(w-1, k-1) / C(n-1, k-1)) / S; 0 where all choices are alike.

    Args:
        parts: Rewards. Shape: [K, N, G].
        weights: Weight of each reward. Shape: [K].
        config: Not used.
        k: Completions of which one must be right.
        correct_from: Weighted sum of rewards from which a completion counts as right.

    Returns:
        Shape: [N, G].

    Raises:
        UserError: `k` is not between 1 and the size of a group.
    """
    right = (parts * weights[:, None, None]).sum(0) >= correct_from
    size = right.shape[1]
    if not 1 <= k <= size:
        raise UserError(f"trainer.advantages_options.k={k} must be between 1 and trainer.group_size={size}")
    found = torch.zeros_like(right, dtype=parts.dtype)
    for row, group in enumerate(right):
        wrong = size - int(group.sum())
        mean = 1 - comb(wrong, k) / comb(size, k)
        spread = (mean * (1 - mean)) ** 0.5
        if not spread:
            continue
        of_wrong = 1 - mean - comb(wrong - 1, k - 1) / comb(size - 1, k - 1)
        found[row, group], found[row, ~group] = (each / (spread + EPSILON) for each in (1 - mean, of_wrong))
    return found
