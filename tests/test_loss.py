"""GRPO's objective, derived by hand and by autograd."""

from __future__ import annotations

import math

import pytest
import torch

from common.grpo.advantages import group_advantages
from common.grpo.loss import LossInputs, grpo_loss


def inputs(**changes):
    logps = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    values = {
        "logps": logps,
        "old_logps": logps.detach(),
        "ref_logps": None,
        "advantages": torch.tensor([1.0, -1.0]),
        "owner": torch.tensor([0, 0, 1]),
        "completions": 2,
    }
    return LossInputs(**{**values, **changes})


def test_on_policy_loss_and_gradient():
    given = inputs()
    out = grpo_loss(given, epsilon=0.2, beta=0.0)
    # completion means -1 and +1, averaged over two completions
    assert out.loss.item() == pytest.approx(0.0)
    out.loss.backward()
    # d/dlogp of -A * ratio / (length * completions) at ratio 1: -1 / 4, -1 / 4, +1 / 2
    assert given.logps.grad.tolist() == pytest.approx([-0.25, -0.25, 0.5])


def test_clipping():
    # ratios e^0.5 = 1.649 and e^-0.5 = 0.607 and 1; advantages 1, 1, -1
    old = torch.tensor([-1.5, -1.5, -0.5])
    given = inputs(old_logps=old)
    out = grpo_loss(given, epsilon=0.2, beta=0.0)
    # token losses -min(1.649, 1.2) = -1.2, -min(0.607, 0.8) = -0.607, +1
    expected = ((-1.2 - math.exp(-0.5)) / 2 + 1) / 2
    assert out.loss.item() == pytest.approx(expected, abs=1e-6)
    assert (out.metrics["clip_low"], out.metrics["clip_high"]) == (0, 1)
    out.loss.backward()
    assert given.logps.grad[0] == 0, "a clipped token has no gradient"


def test_clipping_low():
    given = inputs(old_logps=torch.tensor([-1.0, -2.0, 0.5]))  # ratio e^-1 at advantage -1
    assert grpo_loss(given, 0.2, 0.0).metrics["clip_low"] == 1


def test_kl_is_k3():
    given = inputs(ref_logps=torch.tensor([-1.5, -2.0, -0.5]), advantages=torch.zeros(2))
    out = grpo_loss(given, epsilon=0.2, beta=0.1)
    # difference -0.5: exp(-0.5) + 0.5 - 1 = 0.10653; the other tokens have none
    kl = math.exp(-0.5) + 0.5 - 1
    assert out.metrics["kl"] == pytest.approx(kl, abs=1e-6)
    assert out.loss.item() == pytest.approx(0.1 * (kl / 2) / 2, abs=1e-7)


def test_micro_batches_add_up():
    logps = torch.randn(6, generator=torch.Generator().manual_seed(0))
    owner = torch.tensor([0, 0, 1, 2, 2, 2])
    advantages = torch.tensor([0.3, -1.0, 0.7])
    old = logps + 0.1 * torch.arange(6)
    whole = grpo_loss(LossInputs(logps, old, old, advantages, owner, 3), 0.2, 0.04).loss
    first = grpo_loss(LossInputs(logps[:2], old[:2], old[:2], advantages[:1], owner[:2], 3), 0.2, 0.04).loss
    rest = grpo_loss(LossInputs(logps[2:], old[2:], old[2:], advantages[1:], owner[2:] - 1, 3), 0.2, 0.04).loss
    assert float(first + rest) == pytest.approx(float(whole), abs=1e-7)


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 4.0]])
    # row 0: mean 0.5, unbiased std sqrt(1 / 3); row 2: mean 1, unbiased std 2
    a, b = 0.5 / (math.sqrt(1 / 3) + 1e-4), 1 / (2 + 1e-4)
    expected = [[a, -a, -a, a], [0, 0, 0, 0], [-b, -b, -b, 3 * b]]
    assert group_advantages(rewards).tolist() == [pytest.approx(row, abs=1e-6) for row in expected]
