"""The GRPO objective as a pure function: tensors in, loss and metrics out (arXiv 2402.03300, equation 3).

Per token: -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) + beta KL, with the k3 estimate
KL = exp(ref - logp) - (ref - logp) - 1. Tokens are averaged within a completion, completions over the update (`grpo`).

Example: two completions of 2 and 1 tokens, on-policy (ratio 1), advantages 1 and -1, beta 0. Token losses are
-1, -1, +1; the completion means are -1 and +1; the loss is 0.

Shapes: T tokens of all completions, S completions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LossInputs:
    """Log-probabilities are natural logarithms of the sampled tokens.

    logps: [T], with gradient. old_logps: [T], of the policy that sampled. ref_logps: [T], or None when beta is 0.
    advantages: [S]. owner: [T], the completion of each token. completions: how many completions the whole update has,
    over all micro-batches and ranks.
    """

    logps: torch.Tensor
    old_logps: torch.Tensor
    ref_logps: torch.Tensor | None
    advantages: torch.Tensor
    owner: torch.Tensor
    completions: int


@dataclass(frozen=True)
class LossOutputs:
    """loss: scalar; the losses of all micro-batches add up to the loss of the update. metrics: sums over tokens."""

    loss: torch.Tensor
    metrics: dict[str, float]


def grpo_loss(inputs: LossInputs, epsilon: float, beta: float) -> LossOutputs:
    """Clipped policy-gradient loss with KL penalty."""
    log_ratio = inputs.logps - inputs.old_logps  # [T]
    ratio = log_ratio.exp()  # [T]
    advantage = inputs.advantages[inputs.owner]  # [T]
    token_loss = -torch.min(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)  # [T]
    low = (ratio < 1 - epsilon) & (advantage < 0)  # [T]
    high = (ratio > 1 + epsilon) & (advantage > 0)  # [T]
    metrics = {
        "tokens": float(len(ratio)),
        "clip_low": float(low.sum()),
        "clip_high": float(high.sum()),
    }
    if inputs.ref_logps is not None:
        difference = inputs.ref_logps - inputs.logps  # [T]
        kl = difference.exp() - difference - 1  # [T]
        token_loss = token_loss + beta * kl
        metrics["kl"] = float(kl.detach().sum())
    lengths = torch.bincount(inputs.owner, minlength=len(inputs.advantages))  # [S]
    weight = (lengths[inputs.owner] * inputs.completions).to(inputs.logps.dtype).reciprocal()  # [T]
    return LossOutputs((token_loss * weight).sum(), metrics)
