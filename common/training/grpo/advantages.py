"""Advantages of GRPO: how much better a completion is than its group (arXiv 2402.03300, section 4.1.2).

Example: rewards [1, 0, 0, 1] have mean 0.5 and unbiased standard deviation 0.57735; with the 1e-4 that TRL adds, the
advantages are [0.8659, -0.8659, -0.8659, 0.8659].

Shapes: K reward components, N prompts of the whole update, G completions per prompt.
"""

from __future__ import annotations

import torch

EPSILON = 1e-4  # TRL's and the authors' value


def advantages(parts: torch.Tensor, weights: torch.Tensor, scaling: str, aggregation: str) -> torch.Tensor:
    """From the reward components of all completions to one advantage each.

    Args:
        parts: Every reward of every completion. Shape: [K, N, G].
        weights: Weight of each component in the mix. Shape: [K].
        scaling: See `scaled`. Only used by `sum_then_normalize`.
        aggregation: `sum_then_normalize` (the papers): the weighted sum is compared within the group.
            `normalize_then_sum` (GDPO, arXiv 2601.05242): every component is compared within the group first, so that
            one with a small spread is not drowned; the weighted sum is then standardised over the update.

    Returns:
        Shape: [N, G].
    """
    if aggregation == "sum_then_normalize":
        return scaled((parts * weights[:, None, None]).sum(0), scaling)
    each = (parts - parts.mean(2, keepdim=True)) / (parts.std(2, keepdim=True) + EPSILON)  # [K, N, G]
    total = (each * weights[:, None, None]).sum(0)
    return (total - total.mean()) / (total.std() + EPSILON)


def scaled(rewards: torch.Tensor, scaling: str = "group") -> torch.Tensor:
    """Rewards minus the mean of their group, divided by a spread. Shape: [N, G] -> [N, G].

    Args:
        rewards: The weighted sum of all components.
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
