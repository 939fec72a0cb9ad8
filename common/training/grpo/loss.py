"""Advantages and objective of GRPO and its relatives, as pure functions: tensors in, loss and metrics out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.config.schema import GRPOConfig

# Advantages of GRPO: how much better a completion is than its group (arXiv 2402.03300, section 4.1.2).
#
# Example: rewards [1, 0, 0, 1] have mean 0.5 and unbiased standard deviation 0.57735; with the 1e-4 that TRL adds, the
# advantages are [0.8659, -0.8659, -0.8659, 0.8659].
#
# Shapes: K reward components, N prompts of the whole update, G completions per prompt.


EPSILON = 1e-4  # added to standard deviations, as in TRL and the authors' code


def advantages(parts: torch.Tensor, weights: torch.Tensor, scaling: str, aggregation: str) -> torch.Tensor:
    """Compute one advantage per completion from all its reward components.

    Args:
        parts: Every reward of every completion. Shape: [K, N, G].
        weights: Weight of each component in the mix. Shape: [K].
        scaling: Spread to divide by, see `scaled`. Only used by `sum_then_normalize`.
        aggregation: `sum_then_normalize` (the papers): the weighted sum is normalised within the group.
            `normalize_then_sum` (GDPO, arXiv 2601.05242): every component is normalised within the group first, so that
            a component with a small spread keeps its influence; the weighted sum is then standardised over the update.

    Returns:
        Advantages. Shape: [N, G].
    """
    if aggregation == "sum_then_normalize":
        return scaled((parts * weights[:, None, None]).sum(0), scaling)
    each = (parts - parts.mean(2, keepdim=True)) / (parts.std(2, keepdim=True) + EPSILON)  # [K, N, G]
    total = (each * weights[:, None, None]).sum(0)
    return (total - total.mean()) / (total.std() + EPSILON)


def grpo_advantages(parts: torch.Tensor, weights: torch.Tensor, config: GRPOConfig) -> torch.Tensor:
    """Advantages as `trainer.scale_rewards` and `trainer.multi_objective_aggregation` ask: `trainer.advantages`.

    A function of your own takes the same, and the keys of `trainer.advantages_options` as keyword arguments.

    Args:
        parts: Every reward of every completion of the update, over all ranks. Shape: [K, N, G].
        weights: Weight of each reward in the mix. Shape: [K].
        config: The trainer's configuration.

    Returns:
        Shape: [N, G].
    """
    return advantages(parts, weights, config.scale_rewards, config.multi_objective_aggregation)


def scaled(rewards: torch.Tensor, scaling: str = "group") -> torch.Tensor:
    """Subtract the mean of the group from rewards and divide by a spread. Shape: [N, G] -> [N, G].

    Args:
        rewards: Weighted sum of all components. Shape: [N, G].
        scaling: Divide by the group's unbiased standard deviation plus 1e-4 (`group`: GRPO), by that of the whole
            update (`batch`: arXiv 2508.08221), or not at all (`none`: Dr. GRPO, arXiv 2503.20783).

    >>> scaled(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])).round(decimals=4)
    tensor([[ 0.8659, -0.8659, -0.8659,  0.8659],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if scaling == "none":
        return centred
    spread = rewards.std(dim=1, keepdim=True) if scaling == "group" else rewards.std()
    return centred / (spread + EPSILON)


# The objective.
#
# Per token: -min(ratio A, clip(ratio) A) + beta KL, with the k3 estimate KL = exp(ref - logp) - (ref - logp) - 1
# (arXiv 2402.03300, equations 3 and 4). The loss types differ only in the weight of each token (`token_weights`); the
# sequence-level ratio of GSPO (arXiv 2507.18071) is the exponential of the completion's mean log-ratio.
#
# Example: two completions of 2 and 1 tokens, on-policy (ratio 1), advantages 1 and -1, beta 0, loss type `grpo`. Token
# losses are -1, -1, +1; the completion means are -1 and +1; the loss is 0. With `dapo` all tokens weigh the same: -1/3.
#
# Shapes: T tokens of all completions, S completions, N groups of G completions.


@dataclass(frozen=True)
class LossInputs:
    """Inputs of the loss; log-probabilities are natural logarithms of the sampled tokens' probabilities.

    logps: [T], with gradient.
    old_logps: [T], of the policy that sampled, computed by the trainer's own forward.
    ref_logps: [T], of the reference policy, or None when beta is 0.
    advantages, weights: [S], see `token_weights`; a completion of weight 0 is masked.
    owner: [T], the completion of each token.
    correction: [T], see `importance_correction`, or None.
    other_logps: [K, T], about the K images of `Prompt.scored_with`, of the policy that sampled, or None without them.
    """

    logps: torch.Tensor
    old_logps: torch.Tensor
    ref_logps: torch.Tensor | None
    advantages: torch.Tensor
    weights: torch.Tensor
    owner: torch.Tensor
    correction: torch.Tensor | None = None
    other_logps: torch.Tensor | None = None


@dataclass(frozen=True)
class LossOutputs:
    """Loss and metrics of one micro-batch.

    loss: scalar; the losses of all micro-batches add up to the loss of the update.
    means: under TRL's names, sum and count of averaged values (over tokens; over completions for the sequence
        level).
    lowest, highest: extremes over completions of the share of clipped tokens, None without completions.
    """

    loss: torch.Tensor
    means: dict[str, tuple[float, float]]
    lowest: float | None
    highest: float | None


def token_weights(
    loss_type: str, lengths: torch.Tensor, group_size: int, completions: int, tokens: int, max_tokens: int
) -> torch.Tensor:
    """Return the weight of one token of each completion in the loss. Shape: [S] -> [S].

    Args:
        loss_type: `grpo`: mean over the tokens of a completion, then over completions (arXiv 2402.03300). `dapo`: mean
            over all tokens of the update (arXiv 2503.14476). `bnpo`: mean over all tokens of a group, then over groups;
            TRL's batch normalisation with one group per device batch. `dr_grpo`: sum divided by the constant completion
            limit, so that long wrong answers are not favoured (arXiv 2503.20783).
        lengths: Tokens of each completion, 0 for a masked one. Whole groups, G in a row. Shape: [S].
        group_size: G.
        completions: Completions of the whole update, over all micro-batches and ranks, masked ones included.
        tokens: Tokens of the whole update without masked completions.
        max_tokens: Limit on a completion's length.

    >>> token_weights("grpo", torch.tensor([2, 1]), 2, completions=2, tokens=3, max_tokens=8)
    tensor([0.2500, 0.5000], dtype=torch.float64)
    """
    counted = (lengths > 0).double()
    # Every weight is already divided by the totals of the update, so losses are only summed over micro-batches and
    # ranks.
    if loss_type == "grpo":
        weights = 1 / (completions * lengths.double().clamp(min=1))
    elif loss_type == "dr_grpo":
        weights = torch.full_like(counted, 1 / (completions * max_tokens))
    elif loss_type == "dapo":
        weights = torch.full_like(counted, 1 / max(1, tokens))
    else:
        in_group = lengths.view(-1, group_size).sum(1).double().clamp(min=1)  # [N]
        weights = (group_size / (completions * in_group)).repeat_interleave(group_size)
    return weights * counted


def importance_correction(
    old_logps: torch.Tensor,
    sampled_logps: torch.Tensor,
    owner: torch.Tensor,
    count: int,
    mode: str,
    cap: float,
    floor: float = 0.0,
) -> torch.Tensor:
    """Return weights that correct for a sampler whose numerics differ from the trainer's. Shape: [T] -> [T].

    The ratio of the trainer's probability to the sampler's, per token or of the whole completion; outside `floor` to
    `cap` it is truncated to the nearer one (arXiv 2508.03772), or the token or completion is masked (`mask`).

    Args:
        old_logps: Log-probabilities by the trainer before the update. Shape: [T].
        sampled_logps: Log-probabilities by the sampler. Shape: [T].
        owner: Completion of each token. Shape: [T].
        count: S.
        mode: `token_truncate`, `token_mask`, `sequence_truncate` or `sequence_mask`.
        cap: Largest ratio.
        floor: Smallest ratio.
    """
    difference = old_logps - sampled_logps  # [T]
    level, action = mode.split("_")
    if level == "sequence":
        difference = _sum_by(difference, owner, count)[owner]
    # With `mask`, a weight of 0 takes the token or completion out of the policy-gradient term.
    ratio = difference.exp()
    if action == "truncate":
        return ratio.clamp(floor, cap)
    return ratio.where((ratio >= floor) & (ratio <= cap), 0.0)


# From ratios, advantages and log-probabilities of the tokens, [T] each: the loss of each token, and where the ratio is
# held below and above.
Surrogate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def clipped(epsilon_low: float, epsilon_high: float) -> Surrogate:
    """PPO's pessimistic bound: clipping can remove the incentive to move further, never add one.

    The ratio is clipped to [1 - epsilon_low, 1 + epsilon_high]. Tokens count as clipped where that stops the gradient,
    not merely where the ratio is outside the range.
    """

    def surrogate(
        ratio: torch.Tensor, advantage: torch.Tensor, logps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss = -torch.min(ratio * advantage, ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantage)
        return loss, (ratio < 1 - epsilon_low) & (advantage < 0), (ratio > 1 + epsilon_high) & (advantage > 0)

    return surrogate


def policy_loss(
    inputs: LossInputs, surrogate: Surrogate, beta: float, level: str = "token", correct_kl: bool = False
) -> LossOutputs:
    """Compute a policy-gradient loss with KL penalty.

    Args:
        inputs: Log-probabilities, advantages and weights.
        surrogate: Loss of a token, such as `clipped(0.2, 0.2)`.
        beta: Weight of the KL term.
        level: Ratio of each `token`, or of the `sequence` (GSPO).
        correct_kl: Multiply the KL estimate by the ratio (arXiv 2512.02556, DeepSeek-V3.2), off in both papers.
    """
    counted = inputs.weights[inputs.owner] > 0  # [T]
    log_ratio = inputs.logps - inputs.old_logps  # [T]
    # GSPO: one ratio per completion, exp of its mean log-ratio, used by all its tokens.
    if level == "sequence":
        count = len(inputs.weights)
        lengths = _sum_by(torch.ones_like(log_ratio), inputs.owner, count).clamp(min=1)
        log_ratio = (_sum_by(log_ratio, inputs.owner, count) / lengths)[inputs.owner]
    ratio = log_ratio.exp()
    token_loss, low, high = surrogate(ratio, inputs.advantages[inputs.owner], inputs.logps)  # [T] each
    if inputs.correction is not None:
        token_loss = token_loss * inputs.correction
    low, high = low & counted, high & counted
    measured = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
    if inputs.ref_logps is not None:
        difference = inputs.ref_logps - inputs.logps  # [T]
        # k3 estimate: unbiased for samples of the current policy, and never negative (Schulman).
        kl = difference.exp() - difference - 1
        kl = kl * ratio if correct_kl else kl
        token_loss = token_loss + beta * kl
        measured["kl"] = kl.detach()
    # weights include the division by totals and the mask (weight 0)
    loss = (token_loss * inputs.weights[inputs.owner].to(token_loss)).sum()
    return LossOutputs(loss, *_metrics(measured, inputs, counted, per_completion=level == "sequence"))


def grpo_loss(inputs: LossInputs, config: GRPOConfig) -> LossOutputs:
    """`policy_loss` with the trainer's values: what `trainer.loss` names by default.

    A function of your own takes the same, and the keys of `trainer.loss_options` as keyword arguments. It sums over the
    tokens with their `weights`, which carry the normalisation of the whole update, so that the losses of micro-batches
    and ranks add up.
    """
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    level, correct_kl = config.importance_sampling_level, config.use_bias_correction_kl
    return policy_loss(inputs, clipped(config.epsilon, high), config.beta, level, correct_kl)


def _metrics(
    measured: dict[str, torch.Tensor], inputs: LossInputs, counted: torch.Tensor, per_completion: bool
) -> tuple[dict[str, tuple[float, float]], float | None, float | None]:
    """Return sums, counts and extremes as TRL defines them: a sequence-level ratio counts once per completion."""
    lengths = _sum_by(counted.double(), inputs.owner, len(inputs.weights))  # [S]
    present = lengths > 0
    by_completion = {
        name: (_sum_by(values.double() * counted, inputs.owner, len(inputs.weights)) / lengths.clamp(min=1))[present]
        for name, values in measured.items()
    }
    means = {}
    for name, values in measured.items():
        # The KL stays a value per token, also with a sequence-level ratio.
        once = per_completion and name != "kl"
        total = by_completion[name].sum() if once else (values.double() * counted).sum()
        means[name] = (float(total), float(present.sum() if once else counted.sum()))
    if not present.any():
        return means, None, None
    return means, float(by_completion["clip_ratio/low_mean"].min()), float(by_completion["clip_ratio/high_mean"].max())


def _sum_by(values: torch.Tensor, owner: torch.Tensor, count: int) -> torch.Tensor:
    """Sum over the tokens of each completion. Shape: [T] -> [S]."""
    return values.new_zeros(count).index_add(0, owner, values)
