"""CoOp (Zhou et al. 2022): the words before the class name are learnt, through the frozen text tower."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

WARM_UP = 1e-5


class Context(nn.Module):
    """The token embeddings of every class's prompt, with learnt ones for its context.

    Where the class name stands: at the `end` (the paper's), in the `middle`, or at the `front` of the context.
    """

    embedded: Tensor
    order: Tensor

    def __init__(
        self,
        embedded: Tensor,
        name_lengths: Tensor,
        length: int = 16,
        position: Literal["end", "middle", "front"] = "end",
        per_class: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """
        Args:
            embedded: Of the start token, `length` words of any kind, the class name, a full stop, the end token and
                padding. Shape: [C, tokens, width].
            name_lengths: Tokens of the class names. Shape: [C].
            length: M, the learnt words.
            position: Of the class name.
            per_class: Every class learns a context of its own.
            generator: For the start, of standard deviation 0.02.
        """
        super().__init__()
        shape = (len(embedded), length) if per_class else (length,)
        drawn = torch.randn(*shape, embedded.shape[2], generator=generator) * 0.02
        self.context = nn.Parameter(drawn.to(embedded))
        self.register_buffer("embedded", embedded.detach(), persistent=False)  # they follow from the names
        before = {"end": length, "middle": length // 2, "front": 0}[position]
        self.register_buffer("order", _order(embedded.shape[1], name_lengths, length, before), persistent=False)

    def forward(self) -> Tensor:
        """Shape: [C, tokens, width]. The end token stands where it stood in `embedded`."""
        count, tokens, width = self.embedded.shape
        context = self.context.expand(count, -1, width)
        whole = torch.cat([self.embedded[:, :1], context, self.embedded[:, 1 + context.shape[1] :]], dim=1)
        return whole.gather(1, self.order[:, :, None].expand(count, tokens, width))


def _order(tokens: int, name_lengths: Tensor, length: int, before: int) -> Tensor:
    """Which token of "start, context, name, rest" stands where, if `before` learnt words precede the name."""
    rows = []
    for name_length in name_lengths.tolist():
        first, name, rest = 1 + before, 1 + length, 1 + length + name_length
        rows.append([*range(first), *range(name, rest), *range(first, name), *range(rest, tokens)])
    return torch.tensor(rows)


def learning_rate(epoch: int, epochs: int, peak: float = 0.002) -> float:
    """Of one epoch, counted from 0: a first epoch at 1e-5, then half a cosine from `peak`, as the authors' trainer
    (Dassl) steps it. Its cosine counts the epochs after the first but ends as if that one belonged to it.

    >>> [round(learning_rate(epoch, 50), 8) for epoch in (0, 1, 2, 49)]
    [1e-05, 0.002, 0.00199803, 7.89e-06]
    """
    return WARM_UP if epoch == 0 else peak / 2 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
