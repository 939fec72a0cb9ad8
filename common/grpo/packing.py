"""Laying out prompts and completions for one forward pass.

Shared layout: one row `[prompt 1, its completions, prompt 2, its completions, ...]`. Every prompt is computed once
for its whole group and its image is encoded once; a group costs P + R1 + ... + RG tokens instead of G (P + R). The
attention function (common/grpo/attention.py) keeps completions from seeing each other.

Plain layout: one right-padded row `[prompt, completion]` per completion, as any textbook does it. The oracle.

Example: one prompt of 3 tokens [a b c] with completions [x y] and [z]:
    shared ids        a b c x y z       positions 0 1 2 3 4 3
    predictors        2 3 2             the row before each token; the prompt's last row starts every completion
    targets           x y z
    owner             0 0 1
    plain ids         [a b c x y], [a b c z pad]; predictors 2 3 7 in the flattened rows

Shapes: N prompts, S completions of all prompts, P/R prompt/completion tokens (padded where stated), L tokens of a row,
T completion tokens of all completions together, A position axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from common.models.families import Family


@dataclass(frozen=True)
class Encoded:
    """A prompt as tensors: expanded ids [P], position ids [A, P], and its image (None without one)."""

    ids: torch.Tensor
    positions: torch.Tensor
    pixel_values: torch.Tensor | None
    grid: torch.Tensor | None


@dataclass(frozen=True)
class Group:
    """One prompt and its completions (token ids, end-of-sequence included, no padding)."""

    prompt: Encoded
    completions: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class SharedPrefix:
    """Where the prompts and completions of a shared row lie, for the attention function.

    prefix_index: [N, P] and suffix_index: [S, R] index into the row (padding repeats index 0); `restore` [L] puts the
    concatenated, flattened results back in row order. prefix_lengths: [N]; suffix_owner: [S], the prompt of each
    completion. suffix_mask: see the function.
    """

    prefix_index: torch.Tensor
    prefix_lengths: torch.Tensor
    suffix_index: torch.Tensor
    suffix_owner: torch.Tensor
    restore: torch.Tensor
    suffix_mask: torch.Tensor


def suffix_mask(prefix_lengths: torch.Tensor, suffix_owner: torch.Tensor, prompt: int, own: int) -> torch.Tensor:
    """Which keys [prompt, own completion] a completion token sees, True = sees.

    Shape: [S, 1, R, P + R], or [1, 1, R, P + R] when no prompt is padded.
    """
    causal = torch.ones(own, own, dtype=torch.bool).tril()  # [R, R]
    lengths = prefix_lengths[suffix_owner]
    if bool((lengths == prompt).all()):
        lengths = lengths[:1]
    seen = torch.arange(prompt) < lengths[:, None]  # [S, P]
    return torch.cat([seen[:, None, :].expand(-1, own, -1), causal.expand(len(seen), -1, -1)], 2)[:, None]


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


def pack_shared(groups: Sequence[Group], family: type[Family], device: torch.device) -> Packed:
    """The shared layout of one or several groups."""
    ids: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    prefixes: list[torch.Tensor] = []
    suffixes: list[torch.Tensor] = []
    suffix_owner: list[int] = []
    predictors: list[torch.Tensor] = []
    length = 0
    for number, group in enumerate(groups):
        prompt = group.prompt
        ids.append(prompt.ids)
        positions.append(prompt.positions)
        prefixes.append(torch.arange(length, length + len(prompt.ids)))
        last_row = length = length + len(prompt.ids)
        for completion in group.completions:
            rows = torch.arange(length, length + len(completion))
            ids.append(completion)
            positions.append(_continue(prompt.positions, len(completion)))
            suffixes.append(rows)
            suffix_owner.append(number)
            predictors.append(torch.cat([torch.tensor([last_row - 1]), rows[:-1]]))
            length += len(completion)
    prefix_index, suffix_index = pad_sequence(prefixes, batch_first=True), pad_sequence(suffixes, batch_first=True)
    lengths, owners = torch.tensor([len(p) for p in prefixes]), torch.tensor(suffix_owner)
    layout = SharedPrefix(
        prefix_index,
        lengths,
        suffix_index,
        owners,
        _restore(prefixes, suffixes, length),
        suffix_mask(lengths, owners, prefix_index.shape[1], suffix_index.shape[1]),
    )
    inputs = {
        "input_ids": torch.cat(ids)[None].to(device),
        "position_ids": torch.cat(positions, 1)[:, None].to(device),
        "attention_mask": family.no_mask(),
        "shared_prefix": SharedPrefix(*(getattr(layout, f).to(device) for f in layout.__dataclass_fields__)),
        **images([group.prompt for group in groups], device),
    }
    return _packed(inputs, predictors, groups, device)


def pack_plain(groups: Sequence[Group], pad: int, device: torch.device) -> Packed:
    """One right-padded row per completion; the prompt and its image are repeated."""
    pairs = [(group.prompt, completion) for group in groups for completion in group.completions]
    rows = [torch.cat([prompt.ids, completion]) for prompt, completion in pairs]
    positions = [
        torch.cat([prompt.positions, _continue(prompt.positions, len(completion))], 1) for prompt, completion in pairs
    ]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad)  # [S, L]
    width = ids.shape[1]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    places = pad_sequence([p.T for p in positions], batch_first=True).permute(2, 0, 1)  # [A, S, L]
    predictors = [
        row * width + len(prompt.ids) - 1 + torch.arange(len(completion))
        for row, (prompt, completion) in enumerate(pairs)
    ]
    inputs = {
        "input_ids": ids.to(device),
        "position_ids": places.to(device),
        "attention_mask": mask.to(device),
        **images([prompt for prompt, _ in pairs], device),
    }
    return _packed(inputs, predictors, groups, device)


def score_prompts(packed: Packed, ignored: Sequence[int]) -> Packed:
    """Score the prompts' own tokens too, except `ignored` ids and each prompt's first token, which nothing predicts.

    Only for the shared layout; `owner` of the added tokens is -1.
    """
    layout: SharedPrefix = packed.inputs["shared_prefix"]
    ids = packed.inputs["input_ids"][0]
    inside = torch.arange(layout.prefix_index.shape[1], device=ids.device) < layout.prefix_lengths[:, None]  # [N, P]
    targets = layout.prefix_index[:, 1:][inside[:, 1:]]
    targets = targets[~torch.isin(ids[targets], torch.tensor(list(ignored), device=ids.device))]
    return Packed(
        packed.inputs,
        torch.cat([targets - 1, packed.predictors]),
        torch.cat([ids[targets], packed.targets]),
        torch.cat([torch.full_like(targets, -1), packed.owner]),
        packed.completions,
    )


def images(prompts: Sequence[Encoded], device: torch.device) -> dict[str, torch.Tensor]:
    """The pixels of all prompts as the model takes them: patches of all images in one list."""
    pixels = [prompt.pixel_values for prompt in prompts if prompt.pixel_values is not None]
    grids = [prompt.grid for prompt in prompts if prompt.grid is not None]
    if not pixels:
        return {}
    return {"pixel_values": torch.cat(pixels).to(device), "image_grid_thw": torch.cat(grids).to(device)}


def _packed(
    inputs: dict[str, Any], predictors: list[torch.Tensor], groups: Sequence[Group], device: torch.device
) -> Packed:
    completions = [completion for group in groups for completion in group.completions]
    lengths = torch.tensor([len(completion) for completion in completions])
    owner = torch.repeat_interleave(torch.arange(len(completions)), lengths)
    return Packed(
        inputs, torch.cat(predictors).to(device), torch.cat(completions).to(device), owner.to(device), len(completions)
    )


def _continue(positions: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of `count` text tokens after a prompt: all axes go on from its largest one. Shape: [A, count]."""
    return (positions.max() + 1 + torch.arange(count)).expand(len(positions), -1)


def _restore(prefixes: list[torch.Tensor], suffixes: list[torch.Tensor], length: int) -> torch.Tensor:
    """For each token of the row, its place in `cat([padded prefixes, padded suffixes])` flattened. Shape: [L]."""
    place = torch.empty(length, dtype=torch.long)
    offset = 0
    for pieces in (prefixes, suffixes):
        width = max(len(piece) for piece in pieces)
        for piece in pieces:
            place[piece] = offset + torch.arange(len(piece))
            offset += width
    return place
