"""Where prompts and completions lie in a shared row, and who sees whom.

Shapes: N prompts, S completions of all prompts, at most G of one prompt, P/R prompt/completion tokens (padded), L
tokens of the row, W prompt tokens that completions see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

# What is added to the score of a key that a query does not see. It is finite: a query that sees no key of a block then
# has a log-sum-exp there, and the weight of the block is zero all the same.
HIDDEN = -1e30
ALIGNED = 16  # kernels read the rows of a bias in vectors of up to so many numbers


@dataclass(frozen=True)
class Seen:
    """What completions see of their prompts and of themselves, each apart (see common/forward/merged.py).

    prompt_bias: 0 or HIDDEN, [N or 1, 1, rows or 1, W], for all that attends to a prompt as the rows of one block;
    None: everything is seen. own_bias: [1, 1, R, R]; None: causal. members: [N, G], the completions of each prompt, -1
    where it has fewer; None: all have equally many.
    """

    prompts: int
    prompt_bias: torch.Tensor | None
    own_bias: torch.Tensor | None
    members: torch.Tensor | None


@dataclass(frozen=True)
class SharedPrefix:
    """Where the prompts and completions of a shared row lie, for the attention function.

    prefix_index: [N, P] and suffix_index: [S, R] index into the row (padding repeats index 0); `restore` [L] puts the
    concatenated, flattened results back in row order. prefix_lengths: [N]; suffix_owner: [S], the prompt of each
    completion. blocks: [N, P], see `Family.blocks`, padded with -1. masks: one entry per window, so that the layers of
    a forward share them.
    """

    prefix_index: torch.Tensor
    prefix_lengths: torch.Tensor
    suffix_index: torch.Tensor
    suffix_owner: torch.Tensor
    restore: torch.Tensor
    blocks: torch.Tensor | None
    masks: dict[Any, Any] = field(default_factory=dict, compare=False)

    def to(self, device: torch.device) -> SharedPrefix:
        """The same on another device."""
        names = ("prefix_index", "prefix_lengths", "suffix_index", "suffix_owner", "restore")
        moved = {name: getattr(self, name).to(device) for name in names}
        return SharedPrefix(**moved, blocks=None if self.blocks is None else self.blocks.to(device))

    def prefix_mask(self, window: int | None) -> torch.Tensor | None:
        """Which prompt tokens a prompt token sees, True = sees; None: all before it. Shape: [N, 1, P, P].

        Right padding lies in the future of every real token, so it needs no mask of its own.
        """
        width = self.prefix_index.shape[1]
        if self.blocks is None and (window is None or window >= width):
            return None
        if ("prefix", window) not in self.masks:
            position = torch.arange(width, device=self.prefix_index.device)
            seen = (position <= position[:, None])[None]  # [1, P, P]
            if self.blocks is not None:
                seen = seen | ((self.blocks[:, None] == self.blocks[:, :, None]) & (self.blocks >= 0)[:, None])
            if window is not None:
                seen = seen & (position > position[:, None] - window)
            self.masks["prefix", window] = seen[:, None]
        return self.masks["prefix", window]

    def suffix_keys(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompt tokens that completions can see, and the mask over [those, own completion], True = sees.

        Inside a window only the last `window - 1` tokens of the prompt count.

        Returns:
            Index into the row [N, W], and mask [S, 1, R, W + R] ([1, 1, R, W + R] if all prompts have equal length).
        """
        if ("suffix", window) not in self.masks:
            width, own = self.prefix_index.shape[1], self.suffix_index.shape[1]
            device, lengths = self.prefix_index.device, self.prefix_lengths[:, None]
            positions = torch.arange(width, device=device).expand(len(lengths), -1)  # [N, W]
            index = self.prefix_index
            if window is not None and window <= width:
                positions = lengths - (window - 1) + torch.arange(window - 1, device=device)
                index = index.gather(1, positions.clamp(0, width - 1))
            owner = self.suffix_owner if bool((lengths != lengths[0]).any()) else self.suffix_owner[:1]
            row = torch.arange(own, device=device)[:, None]  # [R, 1]
            before = (positions[owner] >= 0) & (positions[owner] < lengths[owner])  # [S, W]
            seen = before[:, None, :].expand(-1, own, -1)  # [S, R, W]
            itself = (row >= row.T).expand(len(owner), -1, -1)  # [S, R, R]
            if window is not None:
                seen = seen & (positions[owner][:, None, :] > lengths[owner][:, :, None] + row - window)
                itself = itself & (row - window < row.T)
            self.masks["suffix", window] = index, torch.cat([seen, itself], 2)[:, None]
        return self.masks["suffix", window]

    def seen_apart(self, window: int | None, repeat: int, dtype: torch.dtype) -> Seen:
        """What completions see, as `suffix_keys` has it, in the form that attention in two parts takes.

        Args:
            window: Of the layer.
            repeat: Query heads per key head; all are rows of one block.
            dtype: Of the queries.
        """
        key = ("apart", window, repeat, dtype)
        if key not in self.masks:
            index, mask = self.suffix_keys(window)
            count, tokens = len(index), self.suffix_index.shape[1]
            per_prompt = torch.bincount(self.suffix_owner, minlength=count)  # [N]
            starts, most = per_prompt.cumsum(0) - per_prompt, int(per_prompt.max())
            prompt, own = mask[starts if len(mask) > 1 else [0]].split([index.shape[1], tokens], -1)
            if bool((prompt == prompt[:, :, :1]).all()):  # the same for every token of a completion
                rows = prompt[:, :, :1]
            else:
                rows = prompt.repeat(1, 1, repeat * most, 1)
            causal = torch.ones_like(own[0, 0]).tril()
            within = torch.arange(most, device=index.device)
            members = (starts[:, None] + within).where(within < per_prompt[:, None], -1)
            self.masks[key] = Seen(
                count,
                None if bool(rows.all()) else _bias(rows, dtype),
                None if bool((own == causal).all()) else _bias(own[:1], dtype),
                None if bool((members >= 0).all()) else members,
            )
        found: Seen = self.masks[key]
        return found


def _bias(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a key is seen and HIDDEN elsewhere, with rows that begin where kernels can read them."""
    width = seen.shape[-1]
    bias = torch.full((*seen.shape[:-1], width + -width % ALIGNED), HIDDEN, dtype=dtype, device=seen.device)
    bias[..., :width].masked_fill_(seen, 0)
    return bias[..., :width]
