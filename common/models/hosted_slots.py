"""Embeddings beyond the vocabulary that stay on the host, for tables too large for every device.

Shapes: E entries, m rows of an entry, D width, b entries of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from common.models.adapters import without_adapters
from common.models.host_rows import HostRows
from common.models.lazy_adamw import Rule
from common.models.slots import Slots, trained_format
from common.runtime.distributed import gather, world

SPREAD = 16  # entries of which ranks add up the gradients at a time


class HostedSlots(Slots):
    """Slots whose rows stay on the host and are lent to the device for a forward (`HostRows`).

    They are no parameter of the model, so an engine neither holds nor updates them. It does see how large their
    gradient is: that is the gradient of `norm`, a number that never moves. So the engine's norm is that of all
    gradients, and model and rows are clipped alike.
    """

    def __init__(self, embedding: Any, entries: torch.Tensor, trainable: bool, rule: Rule, dtype: torch.dtype) -> None:
        """
        Args:
            embedding: The model's own.
            entries: Shape: [E, m, D].
            trainable: Whether the rows get gradients.
            rule: Of their updates.
            dtype: Of the engine's trained parameters.
        """
        super().__init__(embedding, entries.shape[0], entries.shape[1], trainable)
        self.host = HostRows(entries, rule)
        self.norm = torch.nn.Parameter(torch.zeros(1, dtype=dtype, device=embedding.weight.device), trainable)
        self.gradients: dict[int, torch.Tensor] = {}
        self.last = False  # the backward that follows is the last of an update

    def table(self) -> torch.Tensor:
        """See `Slots.table`."""
        return self.host.table()

    def parts(self) -> list[torch.nn.Parameter]:
        """See `Slots.parts`."""
        return []

    def remember(self) -> None:
        """The host's rows remember how they began."""

    def settle(self) -> None:
        """See `Slots.settle`."""
        self.host.settle()

    def rows(self, numbers: torch.Tensor, beyond: torch.Tensor) -> torch.Tensor:
        """See `Slots.rows`."""
        entries = numbers // self.width
        used = torch.unique(entries[beyond])
        if not len(used):
            used = entries.new_zeros(1)  # so that every forward has the same graph
        lent = self.host.lend(used.tolist(), self.back).to(numbers.device)
        if self.trainable and torch.is_grad_enabled() and not self.back:
            lent = _Lent.apply(lent, self.norm, self, used.tolist())
        places = torch.searchsorted(used, entries).clamp(max=len(used) - 1)
        return lent.flatten(0, 1)[places * self.width + numbers % self.width]

    def add(self, entries: Sequence[int], gradients: torch.Tensor) -> torch.Tensor:
        """Gradients of one backward; of the last one of an update, the norm over all and all ranks is returned."""
        for entry, gradient in zip(entries, gradients.float(), strict=True):
            known = self.gradients.get(entry)
            self.gradients[entry] = gradient.clone() if known is None else known.add_(gradient)
        if not self.last:
            return torch.zeros_like(self.norm)
        self._over_ranks(gradients)
        squares = [gradient.square().sum() for gradient in self.gradients.values()]
        return torch.stack(squares).sum().sqrt().to(self.norm).expand_as(self.norm)

    def _over_ranks(self, like: torch.Tensor) -> None:
        """Average over ranks, as an engine does with the gradients of its parameters."""
        if world() == 1:
            return
        union = sorted(set().union(*gather(set(self.gradients))))
        for start in range(0, len(union), SPREAD):
            part = union[start : start + SPREAD]
            total = torch.zeros((len(part), *like.shape[1:]), device=like.device)
            for place, entry in enumerate(part):
                if entry in self.gradients:
                    total[place] = self.gradients[entry]
            torch.distributed.all_reduce(total)
            for place, entry in enumerate(part):
                self.gradients[entry] = total[place] / world()

    def step(self, rate: float, share: float) -> None:
        """One update with `share` of the gradients, which is below 1 if they were clipped."""
        self.host.step({entry: gradient * share for entry, gradient in self.gradients.items()}, rate)
        self.forget()

    def forget(self) -> None:
        """Drop gradients that no update will use."""
        self.gradients.clear()
        self.last = False


class _Lent(torch.autograd.Function):
    """Rows as they were lent; their gradient goes back to the slots, its norm to the parameter that stands for it."""

    @staticmethod
    def forward(ctx: Any, lent: torch.Tensor, norm: torch.Tensor, slots: HostedSlots, entries: list[int]) -> Any:
        ctx.slots, ctx.entries = slots, entries
        return lent.view_as(lent)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return None, ctx.slots.add(ctx.entries, gradients[0]), None, None


def attach_hosted(model: Any, entries: torch.Tensor, trainable: bool, rule: Rule) -> HostedSlots:
    """As `slots.attach`, with rows that stay on the host. `rule`: of their updates. All ranks call it together."""
    base = without_adapters(model)
    slots = HostedSlots(base.get_input_embeddings(), entries, trainable, rule, trained_format(model))
    base.set_input_embeddings(slots)
    return slots
