"""TAPO's loss (Fine-R1, arXiv 2602.07605), as its authors' code has it: DAPO's, away from a negative, and sharpened.

Per token, with p the policy about the anchor and n about the negative, both of the sampled token, and A the advantage
in a group that was sampled about anchor and partner together:

    clipped(p / p_old, A) - contrast * (n / p - log(n / p) - 1) - sharpening * log p - sharpening_negative * log n

- p_old is the policy that sampled the batch, about the anchor, for the partner's completions as well: nothing corrects
  for their being sampled about another picture. The ratio is 1 before the first update of a batch.
- The second term is the k3 estimate of KL(p || n): 0 where both agree, and subtracted, so the policy learns to say what
  it would not say about the other class. It is unbiased for the anchor's completions alone.
- Both `log` terms are called entropy losses in the authors' code and lower the entropy. n is scored once per batch and
  stored, without gradient: the last term changes the reported loss and trains nothing.

All terms have the weights of `trainer.loss_type`; the authors' is the mean over tokens, `dapo`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from common.config.schema import GRPOConfig, positive
from common.training.grpo.loss import LossInputs, LossOutputs, Surrogate, clipped, policy_loss
from common.types import UserError


def dual_clipped(epsilon_low: float, epsilon_high: float, bound: float) -> Surrogate:
    """PPO's clipping with a second bound (arXiv 1912.09729, equation 5): a negative advantage counts at most `bound`
    times, however much more probable the token has become. Positive ones are as in `clipped`.
    """
    once = clipped(epsilon_low, epsilon_high)

    def surrogate(
        ratio: torch.Tensor, advantage: torch.Tensor, logps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss, low, high = once(ratio, advantage, logps)
        return torch.where(advantage < 0, loss.minimum(-bound * advantage), loss), low, high

    return surrogate


def k3(logps: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Estimate KL(policy || other) of tokens sampled from the policy (Schulman): exp(d) - d - 1, d = other - policy.

    d is held within 20 nats, so that no gradient overflows. Shapes: [T], [T] -> [T].
    """
    difference = (others - logps).clamp(-20, 20)
    return difference.exp() - difference - 1


def tapo(
    inputs: LossInputs,
    config: GRPOConfig,
    contrast: float = 0.01,
    sharpening: float = 0.03,
    sharpening_negative: float = 0.03,
    dual_clip: float = 3.0,
    kl_limit: float = 10.0,
) -> LossOutputs:
    """TAPO's loss, for `trainer.loss`.

    Args:
        inputs: Log-probabilities, advantages and weights. `other_logps` [1, T] are the negative's; without them the
            terms of the negative are left out.
        config: The trainer's configuration: `epsilon`, `epsilon_high`, `beta` (0 in the authors' code).
        contrast: Weight of the KL to the negative.
        sharpening: Weight of -log p.
        sharpening_negative: Weight of -log n, which has no gradient.
        dual_clip: Bound of `dual_clipped`.
        kl_limit: A token's KL estimate is held at this, without a gradient beyond it, so that no token can earn without
            end by becoming improbable. verl's bound (our choice; that of TAPO's code could not be read).

    Raises:
        UserError: A bound is not above 0, or `dual_clip` is within the clipping.
    """
    positive("trainer.loss_options.kl_limit", kl_limit)
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    if dual_clip <= 1 + high:
        raise UserError(
            f"trainer.loss_options.dual_clip={dual_clip} must be above 1 + trainer.epsilon_high={1 + high:g}: it bounds"
            " what clipping leaves"
        )
    surrogate = dual_clipped(config.epsilon, high, dual_clip)
    base = policy_loss(inputs, surrogate, config.beta, config.importance_sampling_level, config.use_bias_correction_kl)
    weights = inputs.weights[inputs.owner].to(inputs.logps)  # [T]
    counted = weights > 0

    def total(values: torch.Tensor) -> torch.Tensor:
        return (values * weights).sum()

    def mean(values: torch.Tensor) -> tuple[float, float]:
        return float((values.detach() * counted).sum()), float(counted.sum())

    loss, means = base.loss - sharpening * total(inputs.logps), dict(base.means)
    means["nll"] = mean(-inputs.logps)
    if inputs.other_logps is not None:
        (negative,) = inputs.other_logps
        kl = k3(inputs.logps, negative).clamp(max=kl_limit)
        loss = loss - contrast * total(kl) - sharpening_negative * total(negative)
        means |= {"kl_negative": mean(kl), "nll_negative": mean(-negative)}
    return replace(base, loss=loss, means=means)
