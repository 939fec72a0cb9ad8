"""Pack prompts and completions into the rows of one forward pass: positions, masks and targets.

The shared layout computes every prompt once for its whole group; the plain layout is one padded row per completion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from common.models.encoder import EncodedPrompt
from common.models.families import Family

# The shared row as the attention function needs it: token indices and masks.
#
# Shapes: N prompts, S completions of all prompts, at most G of one prompt, P/R prompt/completion tokens (padded), L
# tokens of the row, W prompt tokens that completions see.


# Added to the score of a key that a query must not see. It is finite so that a query that sees no key of a block has a
# finite log-sum-exp there (no NaN); merging then gives the block the weight exp(-1e30 - LSE) = 0.
HIDDEN = -1e30
ALIGNED = 16  # kernels read the rows of a bias in vectors of up to so many numbers


@dataclass(frozen=True)
class Seen:
    """Masks of completions on their prompts and on themselves, separately (see common/forward/merged_attention.py).

    prompt_bias: 0 or HIDDEN, [N or 1, 1, rows or 1, W], for all queries of a prompt as the rows of one block; None:
        everything is visible.
    own_bias: [1, 1, R, R]; None: causal.
    members: [N, G], the completions of each prompt, -1 where it has fewer; None: all prompts have equally many.
    """

    prompts: int
    prompt_bias: torch.Tensor | None
    own_bias: torch.Tensor | None
    members: torch.Tensor | None


@dataclass(frozen=True)
class SharedPrefix:
    """Token indices of prompts and completions in a shared row, for the attention function.

    prefix_index: [N, P] and suffix_index: [S, R] index into the row (padding repeats index 0); `restore` [L] puts
        the concatenated, flattened results back in row order.
    prefix_lengths: [N].
    suffix_owner: [S], the prompt of each completion.
    blocks: [N, P], see `Family.blocks`, padded with -1.
    masks: cache with one entry per window, so that the layers of a forward share them.
    """

    prefix_index: torch.Tensor
    prefix_lengths: torch.Tensor
    suffix_index: torch.Tensor
    suffix_owner: torch.Tensor
    restore: torch.Tensor
    blocks: torch.Tensor | None
    masks: dict[Any, Any] = field(default_factory=dict, compare=False)

    def to(self, device: torch.device) -> SharedPrefix:
        """Return a copy on another device."""
        names = ("prefix_index", "prefix_lengths", "suffix_index", "suffix_owner", "restore")
        moved = {name: getattr(self, name).to(device) for name in names}
        return SharedPrefix(**moved, blocks=None if self.blocks is None else self.blocks.to(device))

    def prefix_mask(self, window: int | None) -> torch.Tensor | None:
        """Return which prompt tokens a prompt token sees, or None for a causal mask. True: visible. [N, 1, P, P].

        Right padding lies in the future of every real token, so it needs no mask of its own.
        """
        width = self.prefix_index.shape[1]
        if self.blocks is None and (window is None or window >= width):
            return None
        if ("prefix", window) not in self.masks:
            position = torch.arange(width, device=self.prefix_index.device)
            seen = (position <= position[:, None])[None]  # [1, P, P]
            # tokens of one image see each other in both directions
            if self.blocks is not None:
                seen = seen | ((self.blocks[:, None] == self.blocks[:, :, None]) & (self.blocks >= 0)[:, None])
            if window is not None:
                seen = seen & (position > position[:, None] - window)
            self.masks["prefix", window] = seen[:, None]
        return self.masks["prefix", window]

    def suffix_keys(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prompt tokens that completions can see, and the mask over [those, own completion] (True: visible).

        With a window, only the last `window - 1` tokens of the prompt can be visible.

        Returns:
            Index into the row [N, W], and mask [S, 1, R, W + R] ([1, 1, R, W + R] if all prompts have equal length).
        """
        if ("suffix", window) not in self.masks:
            width, own = self.prefix_index.shape[1], self.suffix_index.shape[1]
            device, lengths = self.prefix_index.device, self.prefix_lengths[:, None]
            positions = torch.arange(width, device=device).expand(len(lengths), -1)  # [N, W]
            index = self.prefix_index
            # Positions of those last tokens; in a short prompt some are negative and masked out below.
            if window is not None and window <= width:
                positions = lengths - (window - 1) + torch.arange(window - 1, device=device)
                index = index.gather(1, positions.clamp(0, width - 1))
            # With prompts of equal length the mask is the same for all completions: build it once and broadcast.
            owner = self.suffix_owner if bool((lengths != lengths[0]).any()) else self.suffix_owner[:1]
            row = torch.arange(own, device=device)[:, None]  # [R, 1]
            # [S, R, W + R]: real tokens of the own prompt, then the own tokens causally
            before = (positions[owner] >= 0) & (positions[owner] < lengths[owner])  # [S, W]
            seen = before[:, None, :].expand(-1, own, -1)  # [S, R, W]
            itself = (row >= row.T).expand(len(owner), -1, -1)  # [S, R, R]
            if window is not None:
                # Completion token r has position length + r in the sequence, and sees the positions above length + r -
                # window.
                seen = seen & (positions[owner][:, None, :] > lengths[owner][:, :, None] + row - window)
                itself = itself & (row - window < row.T)
            self.masks["suffix", window] = index, torch.cat([seen, itself], 2)[:, None]
        return self.masks["suffix", window]

    def seen_apart(self, window: int | None, repeat: int, dtype: torch.dtype) -> Seen:
        """Return the mask of `suffix_keys` in the form that merged attention needs.

        Args:
            window: Sliding window of the layer; None: full attention.
            repeat: Query heads per key head; all are rows of one block.
            dtype: Number format of the queries.
        """
        key = ("apart", window, repeat, dtype)
        if key not in self.masks:
            index, mask = self.suffix_keys(window)
            count, tokens = len(index), self.suffix_index.shape[1]
            per_prompt = torch.bincount(self.suffix_owner, minlength=count)  # [N]
            starts, most = per_prompt.cumsum(0) - per_prompt, int(per_prompt.max())
            # One mask per prompt suffices: all completions of a prompt have the same one. `starts`: first completion of
            # each.
            each = mask[starts] if len(mask) > 1 else mask
            prompt, own = each.split([index.shape[1], tokens], -1)
            if bool((prompt == prompt[:, :, :1]).all()):  # the same for all tokens of a completion
                rows = prompt[:, :, :1]
            else:
                # Rows in the order of `fold`: heads, completions, tokens.
                rows = prompt.repeat(1, 1, repeat * most, 1)
            causal = torch.ones_like(own[0, 0]).tril()
            within = torch.arange(most, device=index.device)
            members = (starts[:, None] + within).where(within < per_prompt[:, None], -1)
            # A bias that hides nothing becomes None, which lets the faster kernels run.
            self.masks[key] = Seen(
                count,
                None if bool(rows.all()) else _bias(rows, dtype),
                None if bool((own == causal).all()) else _bias(own[:1], dtype),
                None if bool((members >= 0).all()) else members,
            )
        found: Seen = self.masks[key]
        return found


def _bias(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a bias of 0 where a key is visible and HIDDEN elsewhere, whose rows start at aligned addresses."""
    width = seen.shape[-1]
    bias = torch.full((*seen.shape[:-1], width + -width % ALIGNED), HIDDEN, dtype=dtype, device=seen.device)
    bias[..., :width].masked_fill_(seen, 0)
    return bias[..., :width]


# The two layouts.
#
# Shared: one row `[prompt 1, its completions, prompt 2, its completions, ...]`. Every prompt and its image are computed
# once for the whole group; a group costs P + R1 + ... + RG tokens instead of G (P + R). The attention function
# (common/forward/attention.py) keeps completions from seeing each other.
#
# Plain: one right-padded row `[prompt, completion]` per completion, the usual way. Self-checks compare against it.
#
# Example: one prompt of 3 tokens [a b c] with completions [x y] and [z]:
# shared ids        a b c x y z       positions 0 1 2 3 4 3
# predictors        2 3 2             the row before each token; the prompt's last row starts every completion
# targets           x y z
# owner             0 0 1
# plain ids         [a b c x y], [a b c z pad]; predictors 2 3 7 in the flattened rows
#
# Shapes: N prompts, S completions of all prompts, P/R prompt/completion tokens (padded where stated), L tokens of a
# row, T completion tokens of all completions together, A position axes, D width.

T = TypeVar("T")
WORTHWHILE = 1.1  # impl=auto takes the shared layout if it saves at least this factor in tokens


@dataclass(frozen=True)
class PromptGroup:
    """One prompt and its completions (token ids, end-of-sequence included, no padding)."""

    prompt: EncodedPrompt
    completions: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Packed:
    """Inputs of one forward, with the rows that predict the tokens to score.

    inputs: keyword arguments of the model.
    predictors, targets, owner: [T]; predictors index the flattened rows of the forward, owner counts completions in
        the order of the groups.
    completions: their number.
    """

    inputs: dict[str, Any]
    predictors: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    completions: int

    @property
    def tokens(self) -> int:
        """Return the number of tokens that go through the language model, padding included."""
        return int(self.inputs["input_ids"].numel())


def followed_by(prompt: EncodedPrompt, ids: torch.Tensor) -> EncodedPrompt:
    """Return the prompt extended by the beginning of a reply, token ids [R]."""
    blocks = None if prompt.blocks is None else torch.cat([prompt.blocks, torch.full_like(ids, -1)])
    positions = torch.cat([prompt.positions, _continue(prompt.positions, len(ids))], 1)
    return replace(prompt, ids=torch.cat([prompt.ids, ids]), positions=positions, blocks=blocks)


def shared_tokens(group: PromptGroup) -> int:
    """Return the number of tokens of a group in the shared layout."""
    return len(group.prompt.ids) + sum(len(completion) for completion in group.completions)


def plain_tokens(groups: Sequence[PromptGroup]) -> int:
    """Return the number of tokens of the plain layout, padding included."""
    rows = [len(group.prompt.ids) + len(completion) for group in groups for completion in group.completions]
    return len(rows) * max(rows)


def within_budget(
    items: Sequence[int], tokens: Callable[[int], int], budget: int | None, at_most: int
) -> list[list[int]]:
    """Split items into consecutive parts of at most `budget` tokens and `at_most` items each.

    An item above the budget gets a part of its own.

    >>> within_budget([0, 1, 2, 3], [5, 4, 3, 9].__getitem__, budget=9, at_most=2)
    [[0, 1], [2], [3]]
    """
    parts: list[list[int]] = []
    used = 0
    for item in items:
        size = tokens(item)
        if not parts or len(parts[-1]) == at_most or (budget is not None and used + size > budget):
            parts.append([])
            used = 0
        parts[-1].append(item)
        used += size
    return parts


def micro_batches(items: list[T], size: int) -> Iterator[list[T]]:
    """Yield consecutive slices of `size` items.

    >>> list(micro_batches([1, 2, 3], 2))
    [[1, 2], [3]]
    """
    for start in range(0, len(items), size):
        yield items[start : start + size]


def pack(groups: Sequence[PromptGroup], family: type[Family], pad: int, device: torch.device, impl: str) -> Packed:
    """The layout that `trainer.impl` names: `shared`, `plain`, or `auto`, the shared one where it saves tokens."""
    if impl == "auto" and not family.shares_prefixes:
        impl = "plain"
    elif impl == "auto":
        saved = plain_tokens(groups) / sum(shared_tokens(group) for group in groups)
        impl = "shared" if saved >= WORTHWHILE else "plain"
    return pack_plain(groups, family, pad, device) if impl == "plain" else pack_shared(groups, family, device)


def pack_shared(groups: Sequence[PromptGroup], family: type[Family], device: torch.device) -> Packed:
    """Pack one or several groups in the shared layout."""
    prompts = [group.prompt for group in groups]
    # Order of the row: prompt 1, its completions, prompt 2, ... with the start and size of every piece.
    pieces = [piece for group in groups for piece in (group.prompt.ids, *group.completions)]
    sizes = torch.tensor([len(piece) for piece in pieces])
    starts = sizes.cumsum(0) - sizes
    is_prompt = torch.tensor([piece is None for group in groups for piece in (None, *group.completions)])
    # Indices of prompts and completions as padded batches, which the attention function gathers.
    owner = is_prompt.cumsum(0)[~is_prompt] - 1  # [S]
    prefix, in_prefix = _padded(starts[is_prompt], sizes[is_prompt])  # [N, P]
    suffix, in_suffix = _padded(starts[~is_prompt], sizes[~is_prompt])  # [S, R]
    # Positions: a completion continues after the largest position of its prompt, on all axes (M-RoPE: an image takes
    # fewer positions than tokens), and all completions of a prompt start at the same one.
    after = torch.stack([prompt.positions.max() + 1 for prompt in prompts])  # [N]
    positions = torch.empty(len(prompts[0].positions), int(sizes.sum()), dtype=torch.long)  # [A, L]
    positions[:, prefix[in_prefix]] = torch.cat([prompt.positions for prompt in prompts], 1)
    positions[:, suffix[in_suffix]] = (after[owner][:, None] + torch.arange(suffix.shape[1]))[in_suffix]
    # Predictors: the row before each completion token, and for the first token the last row of its prompt.
    before = suffix - 1
    before[:, 0] = (starts + sizes - 1)[is_prompt][owner]  # the last row of its prompt
    layout = SharedPrefix(
        prefix,
        sizes[is_prompt],
        suffix,
        owner,
        _restore(
            torch.cat([prefix.flatten(), suffix.flatten()]), torch.cat([in_prefix.flatten(), in_suffix.flatten()])
        ),
        pad_blocks(prompts),
    )
    inputs = {
        "input_ids": torch.cat(pieces)[None].to(device),
        "position_ids": family.position_ids(positions[:, None]).to(device),
        "attention_mask": family.no_mask(),  # the layout below says who sees whom
        "shared_prefix": layout.to(device),
        **images(prompts, family, device),
    }
    return _packed(inputs, before[in_suffix], groups, device)


def pack_plain(groups: Sequence[PromptGroup], family: type[Family], pad: int, device: torch.device) -> Packed:
    """Pack one right-padded row per completion; the prompt and its image are repeated."""
    pairs = [(group.prompt, completion) for group in groups for completion in group.completions]
    rows = [torch.cat([prompt.ids, completion]) for prompt, completion in pairs]
    positions = [
        torch.cat([prompt.positions, _continue(prompt.positions, len(completion))], 1) for prompt, completion in pairs
    ]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad)  # [S, L]
    width = ids.shape[1]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    padded = pad_sequence([p.T for p in positions], batch_first=True).permute(2, 0, 1)  # [A, S, L]
    # row index in the flattened [S, L]: the last prompt token predicts the first completion token
    predictors = [
        row * width + len(prompt.ids) - 1 + torch.arange(len(completion))
        for row, (prompt, completion) in enumerate(pairs)
    ]
    inputs = {
        "input_ids": ids.to(device),
        "position_ids": family.position_ids(padded).to(device),
        "attention_mask": mask.to(device),
        **images([prompt for prompt, _ in pairs], family, device),
    }
    blocks = pad_blocks([prompt for prompt, _ in pairs], width)
    if blocks is not None:
        inputs |= family.block_inputs(blocks.to(device))
    return _packed(inputs, torch.cat(predictors), groups, device)


def pad_blocks(prompts: Sequence[EncodedPrompt], width: int = 0, left: bool = False) -> torch.Tensor | None:
    """Return the prompts' image blocks, padded with -1 to the longest (or to `width`); None: causal. Shape: [B, L]."""
    if prompts[0].blocks is None:
        return None
    width = max(width, *(len(prompt.ids) for prompt in prompts))
    rows = torch.full((len(prompts), width), -1)
    for row, prompt in zip(rows, prompts, strict=True):
        assert prompt.blocks is not None
        start = width - len(prompt.ids) if left else 0
        row[start : start + len(prompt.ids)] = prompt.blocks
    return rows


def score_prompts(packed: Packed, ignored: Sequence[int], vocabulary: int) -> Packed:
    """Add the prompts' own tokens to the targets.

    Left out are `ignored` ids, ids beyond the `vocabulary` (no output predicts them) and each prompt's first token (no
    token is before it). Only for the shared layout; `owner` of the added tokens is -1.
    """
    layout: SharedPrefix = packed.inputs["shared_prefix"]
    ids = packed.inputs["input_ids"][0]
    # Positions of all real prompt tokens but the first; the token before, in the row as in the prompt, predicts each.
    inside = torch.arange(layout.prefix_index.shape[1], device=ids.device) < layout.prefix_lengths[:, None]  # [N, P]
    targets = layout.prefix_index[:, 1:][inside[:, 1:]]
    targets = targets[~torch.isin(ids[targets], torch.tensor(list(ignored), device=ids.device))]
    targets = targets[ids[targets] < vocabulary]
    return Packed(
        packed.inputs,
        torch.cat([targets - 1, packed.predictors]),
        torch.cat([ids[targets], packed.targets]),
        torch.cat([torch.full_like(targets, -1), packed.owner]),
        packed.completions,
    )


def images(prompts: Sequence[EncodedPrompt], family: type[Family], device: torch.device) -> dict[str, Any]:
    """Return the images of all prompts in the model's input format, or their features (see `Family.feature_inputs`)."""
    inputs: dict[str, Any] = {}
    if features := [prompt.features.to(device) for prompt in prompts if prompt.features is not None]:
        inputs |= family.feature_inputs(features)
    if pixels := [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]:
        found = family.pixel_inputs(pixels, [prompt.grid for prompt in prompts if prompt.grid is not None])
        inputs |= {name: tensor.to(device) for name, tensor in found.items()}
    return inputs


def _packed(
    inputs: dict[str, Any], predictors: torch.Tensor, groups: Sequence[PromptGroup], device: torch.device
) -> Packed:
    completions = [completion for group in groups for completion in group.completions]
    lengths = torch.tensor([len(completion) for completion in completions])
    owner = torch.repeat_interleave(torch.arange(len(completions)), lengths)
    return Packed(inputs, predictors.to(device), torch.cat(completions).to(device), owner.to(device), len(completions))


def _continue(positions: torch.Tensor, count: int) -> torch.Tensor:
    """Return positions of `count` text tokens after a prompt: all axes continue from its maximum. Shape: [A, count]."""
    return (positions.max() + 1 + torch.arange(count)).expand(len(positions), -1)


def _padded(starts: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Arrange pieces of a row as a batch: indices into the row, padded with 0, and a mask of real ones. Both [B, W]."""
    within = torch.arange(int(sizes.max()))
    real = within < sizes[:, None]
    return (starts[:, None] + within).where(real, 0), real


def _restore(index: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Return, for each token of the row, its place among the real entries of `index`. Shape: [B], [B] -> [L]."""
    places = real.nonzero()[:, 0]
    restore = torch.empty_like(places)
    restore[index[places]] = places
    return restore
