"""Group advantages of GRPO (arXiv 2402.03300, section 4.1.2; CLS-RL section 3.1).

Example: rewards [1, 0, 0, 1] have mean 0.5 and unbiased standard deviation 0.57735; with the 1e-4 that TRL adds, the
advantages are [0.8659, -0.8659, -0.8659, 0.8659].

Shapes: N prompts, G completions per prompt.
"""

from __future__ import annotations

import torch

EPSILON = 1e-4  # TRL's and the authors' value


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Reward minus the group's mean, over the group's unbiased standard deviation plus 1e-4. Shape: [N, G] -> [N, G].

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])).round(decimals=4)
    tensor([[ 0.8659, -0.8659, -0.8659,  0.8659],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    mean = rewards.mean(dim=1, keepdim=True)
    return (rewards - mean) / (rewards.std(dim=1, keepdim=True) + EPSILON)
