"""Pack episodes into one forward: a prompt's beginning is computed once for several input images and their replies.

A row is `[beginning, image 1, reply 1, image 2, reply 2, ...]`. The beginning has the instruction and the reference
categories. Every part after it continues at the beginning's last position and attends to the beginning and to itself,
never to another part: the result is the same as for each prompt alone.

Shapes: B rows, L tokens of the longest row, E categories, m tokens of an image, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

NONE = -1  # part of padding tokens, category of ordinary tokens


@dataclass(frozen=True)
class Row:
    """One prompt's beginning with several endings, each an input image and a reply.

    beginning: ids up to the input image.
    image: ids of the input image and of the text between it and the reply.
    replies: ids, ends of turn included.
    categories: entry in the bank of each input image.
    names: id of the category's name of each input image.
    """

    beginning: list[int]
    image: list[int]
    replies: list[list[int]]
    categories: list[int]
    names: list[int]


@dataclass(frozen=True)
class Rows:
    """Rows as tensors [B, L].

    parts: 0 in the beginning, then 1, 2, ...
    images: mask of image tokens.
    targets: mask of reply tokens.
    categories, names: those of a part's input image, NONE in the beginning.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    parts: torch.Tensor
    images: torch.Tensor
    targets: torch.Tensor
    categories: torch.Tensor
    names: torch.Tensor


def lay_out(rows: Sequence[Row], image_token: int, pad: int) -> Rows:
    """Stack rows, right-padded."""
    ids, positions, parts, targets, categories, names = [], [], [], [], [], []
    for row in rows:
        endings = [row.image + reply for reply in row.replies]
        lengths = torch.tensor([len(row.beginning), *map(len, endings)])
        starts = torch.tensor([0] + [len(row.beginning)] * len(endings))
        part = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        ids.append(torch.tensor(sum(endings, row.beginning)))
        # Positions restart for every part at the length of the beginning.
        positions.append(torch.arange(len(part)) - (lengths.cumsum(0) - lengths - starts)[part])
        parts.append(part)
        targets.append((part > 0) & (positions[-1] >= len(row.beginning) + len(row.image)))
        categories.append(torch.tensor([NONE, *row.categories])[part])
        names.append(torch.tensor([NONE, *row.names])[part])
    padded = pad_sequence(ids, batch_first=True, padding_value=pad)
    return Rows(
        padded,
        pad_sequence(positions, batch_first=True),
        pad_sequence(parts, batch_first=True, padding_value=NONE),
        padded == image_token,
        pad_sequence(targets, batch_first=True, padding_value=False),
        pad_sequence(categories, batch_first=True, padding_value=NONE),
        pad_sequence(names, batch_first=True, padding_value=NONE),
    )


def visible(rows: Rows, window: int) -> dict[str, torch.Tensor]:
    """Return the mask per kind of layer of Gemma 3: causal, image blocks both ways, at most `window` back.

    Shape: [B, L, L], bool.
    """
    part, position = rows.parts, rows.positions
    own = part[:, :, None] == part[:, None]  # padding attends to padding: an empty mask row gives NaN
    block = own & rows.images[:, :, None] & rows.images[:, None]
    before = position[:, None] <= position[:, :, None]
    near = position[:, :, None] - position[:, None] < window
    full = (own | (part == 0)[:, None]) & (before | block)
    return {"full_attention": full, "sliding_attention": full & near}


def forward(
    model: Any, rows: Rows, seen: dict[str, torch.Tensor], bank: torch.Tensor | None, features: torch.Tensor, first: int
) -> Any:
    """Run the language model on the rows; return hidden states, and attentions if it computes them.

    Args:
        model: A `Gemma3ForConditionalGeneration`.
        rows: Episodes; ids from `first` on are categories, row j of entry e being `first + e * m + j`.
        seen: Attention masks from `visible`.
        bank: Category embeddings; None: the rows have no categories. Shape: [E, m, D].
        features: Embeddings of the input images, in the order of the rows. Shape: [images, m, D].
        first: Number of rows of the model's vocabulary.
    """
    category = rows.ids >= first
    embedded = model.get_input_embeddings()(rows.ids.where(~category, 0))  # [B, L, D]
    if bank is not None:
        entries = bank.flatten(0, 1)[(rows.ids - first).clamp(min=0)]
        embedded = torch.where(category[..., None], entries, embedded)
    masks = {kind: torch.zeros(()).where(mask, -torch.inf)[:, None] for kind, mask in seen.items()}
    return model.model.language_model(
        inputs_embeds=embedded.masked_scatter(rows.images[..., None], features),
        attention_mask=masks,
        position_ids=rows.positions,
        use_cache=False,
        output_hidden_states=True,
        output_attentions=True,
    )


def reply_loss(model: Any, rows: Rows, hidden: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the reply tokens, in nats; `hidden`: outputs of the last layer [B, L, D]."""
    predictor = torch.roll(rows.targets, -1, dims=1)  # the token before each target predicts it
    return F.cross_entropy(model.lm_head(hidden[predictor]), rows.ids[rows.targets])
