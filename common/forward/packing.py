"""Laying out prompts and completions for one forward pass.

Shared layout: one row `[prompt 1, its completions, prompt 2, its completions, ...]`. Every prompt is computed once
for its whole group and its image is encoded once; a group costs P + R1 + ... + RG tokens instead of G (P + R). The
attention function (common/forward/attention.py) keeps completions from seeing each other.

Plain layout: one right-padded row `[prompt, completion]` per completion, as any textbook does it. The oracle.

Example: one prompt of 3 tokens [a b c] with completions [x y] and [z]:
    shared ids        a b c x y z       positions 0 1 2 3 4 3
    predictors        2 3 2             the row before each token; the prompt's last row starts every completion
    targets           x y z
    owner             0 0 1
    plain ids         [a b c x y], [a b c z pad]; predictors 2 3 7 in the flattened rows

Shapes: N prompts, S completions of all prompts, P/R prompt/completion tokens (padded where stated), L tokens of a row,
T completion tokens of all completions together, A position axes, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from common.forward.layout import SharedPrefix
from common.models.encoder import Encoded
from common.models.families import Family

T = TypeVar("T")
WORTHWHILE = 1.1  # impl=auto takes the shared layout where it saves at least this factor in tokens


@dataclass(frozen=True)
class Group:
    """One prompt and its completions (token ids, end-of-sequence included, no padding)."""

    prompt: Encoded
    completions: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Packed:
    """Inputs of one forward, and which of its rows predict which tokens.

    inputs: keyword arguments of the model. predictors, targets, owner: [T]; predictors index the flattened rows of the
    forward, owner counts completions in the order of the groups.
    """

    inputs: dict[str, Any]
    predictors: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    completions: int

    @property
    def tokens(self) -> int:
        """Tokens that go through the language model, padding included."""
        return int(self.inputs["input_ids"].numel())


def followed_by(prompt: Encoded, ids: torch.Tensor) -> Encoded:
    """The prompt with the beginning of a reply, token ids [R], already behind it."""
    blocks = None if prompt.blocks is None else torch.cat([prompt.blocks, torch.full_like(ids, -1)])
    positions = torch.cat([prompt.positions, _continue(prompt.positions, len(ids))], 1)
    return replace(prompt, ids=torch.cat([prompt.ids, ids]), positions=positions, blocks=blocks)


def shared_tokens(group: Group) -> int:
    """Tokens of a group in the shared layout."""
    return len(group.prompt.ids) + sum(len(completion) for completion in group.completions)


def plain_tokens(groups: Sequence[Group]) -> int:
    """Tokens of the plain layout, padding included."""
    rows = [len(group.prompt.ids) + len(completion) for group in groups for completion in group.completions]
    return len(rows) * max(rows)


def within_budget(
    items: Sequence[int], tokens: Callable[[int], int], budget: int | None, at_most: int
) -> list[list[int]]:
    """Consecutive items in as few parts as hold at most `budget` tokens and `at_most` items each.

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
    """Consecutive slices of `size` items.

    >>> list(micro_batches([1, 2, 3], 2))
    [[1, 2], [3]]
    """
    for start in range(0, len(items), size):
        yield items[start : start + size]


def pack(groups: Sequence[Group], family: type[Family], pad: int, device: torch.device, impl: str) -> Packed:
    """The layout that `trainer.impl` names: `shared`, `plain`, or `auto`, the shared one where it saves tokens."""
    if impl == "auto":
        saved = plain_tokens(groups) / sum(shared_tokens(group) for group in groups)
        impl = "shared" if saved >= WORTHWHILE else "plain"
    return pack_plain(groups, family, pad, device) if impl == "plain" else pack_shared(groups, family, device)


def pack_shared(groups: Sequence[Group], family: type[Family], device: torch.device) -> Packed:
    """The shared layout of one or several groups."""
    prompts = [group.prompt for group in groups]
    pieces = [piece for group in groups for piece in (group.prompt.ids, *group.completions)]
    sizes = torch.tensor([len(piece) for piece in pieces])
    starts = sizes.cumsum(0) - sizes
    is_prompt = torch.tensor([piece is None for group in groups for piece in (None, *group.completions)])
    owner = is_prompt.cumsum(0)[~is_prompt] - 1  # [S]
    prefix, in_prefix = _padded(starts[is_prompt], sizes[is_prompt])  # [N, P]
    suffix, in_suffix = _padded(starts[~is_prompt], sizes[~is_prompt])  # [S, R]
    after = torch.stack([prompt.positions.max() + 1 for prompt in prompts])  # [N]
    positions = torch.empty(len(prompts[0].positions), int(sizes.sum()), dtype=torch.long)  # [A, L]
    positions[:, prefix[in_prefix]] = torch.cat([prompt.positions for prompt in prompts], 1)
    positions[:, suffix[in_suffix]] = (after[owner][:, None] + torch.arange(suffix.shape[1]))[in_suffix]
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
        # one entry per kind of layer, so that transformers makes no mask of its own
        "attention_mask": {"full_attention": None, "sliding_attention": None},
        "shared_prefix": layout.to(device),
        **images(prompts, family, device),
    }
    return _packed(inputs, before[in_suffix], groups, device)


def pack_plain(groups: Sequence[Group], family: type[Family], pad: int, device: torch.device) -> Packed:
    """One right-padded row per completion; the prompt and its image are repeated."""
    pairs = [(group.prompt, completion) for group in groups for completion in group.completions]
    rows = [torch.cat([prompt.ids, completion]) for prompt, completion in pairs]
    positions = [
        torch.cat([prompt.positions, _continue(prompt.positions, len(completion))], 1) for prompt, completion in pairs
    ]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad)  # [S, L]
    width = ids.shape[1]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    padded = pad_sequence([p.T for p in positions], batch_first=True).permute(2, 0, 1)  # [A, S, L]
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


def pad_blocks(prompts: Sequence[Encoded], width: int = 0, left: bool = False) -> torch.Tensor | None:
    """The prompts' image blocks, padded with -1 to the longest (or to `width`); None: causal. Shape: [B, L]."""
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
    """Score the prompts' own tokens too, except `ignored` ids, those beyond the `vocabulary`, that nothing can predict,
    and each prompt's first token, that nothing does.

    Only for the shared layout; `owner` of the added tokens is -1.
    """
    layout: SharedPrefix = packed.inputs["shared_prefix"]
    ids = packed.inputs["input_ids"][0]
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


def images(prompts: Sequence[Encoded], family: type[Family], device: torch.device) -> dict[str, torch.Tensor]:
    """The images of all prompts as the model takes them, or their ready features (see `logprobs.spliced`)."""
    inputs: dict[str, torch.Tensor] = {}
    if features := [prompt.features for prompt in prompts if prompt.features is not None]:
        inputs["image_features"] = torch.cat(features)
    if pixels := [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]:
        inputs |= family.pixel_inputs(pixels, [prompt.grid for prompt in prompts if prompt.grid is not None])
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _packed(inputs: dict[str, Any], predictors: torch.Tensor, groups: Sequence[Group], device: torch.device) -> Packed:
    completions = [completion for group in groups for completion in group.completions]
    lengths = torch.tensor([len(completion) for completion in completions])
    owner = torch.repeat_interleave(torch.arange(len(completions)), lengths)
    return Packed(inputs, predictors.to(device), torch.cat(completions).to(device), owner.to(device), len(completions))


def _continue(positions: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of `count` text tokens after a prompt: all axes go on from its largest one. Shape: [A, count]."""
    return (positions.max() + 1 + torch.arange(count)).expand(len(positions), -1)


def _padded(starts: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces of a row as a batch: indices into the row, padded with 0, and which of them are real. Both [B, W]."""
    within = torch.arange(int(sizes.max()))
    real = within < sizes[:, None]
    return (starts[:, None] + within).where(real, 0), real


def _restore(index: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """For each token of the row, where it is among the real ones of `index`. Shape: [B], [B] -> [L]."""
    places = real.nonzero()[:, 0]
    restore = torch.empty_like(places)
    restore[index[places]] = places
    return restore
