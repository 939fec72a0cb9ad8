"""AdamW of rows that most updates do not touch: what an update without a gradient does to them is done when they are
next asked for.

The same arithmetic as `torch.optim.AdamW` on the whole table, in the same order. A row without a gradient still shrinks
by rate times decay and drifts on by its momentum; both are replayed, one missed update after the other.

Shapes: any, all tensors alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

EPSILON = 1e-8  # of torch's AdamW
FORGOTTEN = 2.0**-30  # share of a step that no fp32 row notices


@dataclass(frozen=True)
class Rule:
    """What does not change from update to update."""

    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0

    @property
    def horizon(self) -> int:
        """Missed updates after which the momentum has died away against the second moment's root."""
        shrinks = self.betas[0] / math.sqrt(self.betas[1]) if self.betas[1] > 0 else 0.0
        return 1 if shrinks == 0 else math.ceil(math.log(FORGOTTEN) / math.log(min(shrinks, 1 - 1e-4)))


@dataclass
class Moments:
    """Of some rows: first and second moment, and the update that they have seen last, from 1; 0: none."""

    first: torch.Tensor
    second: torch.Tensor
    last: int


def step(rows: torch.Tensor, moments: Moments, gradient: torch.Tensor, rate: float, rule: Rule) -> None:
    """Update number `moments.last + 1`, in place."""
    rows.mul_(1 - rate * rule.weight_decay)
    moments.first.lerp_(gradient, 1 - rule.betas[0])
    moments.second.mul_(rule.betas[1]).addcmul_(gradient, gradient, value=1 - rule.betas[1])
    moments.last += 1
    _move(rows, moments, rate, rule)


def catch_up(rows: torch.Tensor, moments: Moments, rates: Sequence[float], rule: Rule) -> None:
    """The updates `moments.last + 1` to `len(rates)`, none of which had a gradient, in place.

    Args:
        rows: Are changed.
        moments: Are changed.
        rates: Learning rates of all updates so far.
        rule: Of all updates.
    """
    for number in range(moments.last, min(moments.last + rule.horizon, len(rates)) if moments.last else 0):
        rows.mul_(1 - rates[number] * rule.weight_decay)
        moments.first.mul_(rule.betas[0])
        moments.second.mul_(rule.betas[1])
        moments.last = number + 1
        _move(rows, moments, rates[number], rule)
    if missed := rates[moments.last :]:  # rows that never moved, or whose momentum is forgotten, only shrink
        rows.mul_(math.prod(1 - rate * rule.weight_decay for rate in missed))
        moments.first.zero_()
        moments.second.mul_(rule.betas[1] ** len(missed))
        moments.last = len(rates)


def _move(rows: torch.Tensor, moments: Moments, rate: float, rule: Rule) -> None:
    corrections = [1 - beta**moments.last for beta in rule.betas]
    root = moments.second.sqrt().div_(math.sqrt(corrections[1])).add_(EPSILON)
    rows.addcdiv_(moments.first, root, value=-rate / corrections[0])
