"""Episodes as one forward: a prompt's beginning is computed once for several input images and their replies.

A row is `[beginning, image 1, reply 1, image 2, reply 2, ...]`. Beginning: instruction and reference categories. Every
part after it goes on at the beginning's end and sees the beginning and itself, never another part: what the model
computes is what it computes for each prompt alone.

Shapes: B rows, Q parts of a row, L tokens of the longest row, E categories, m tokens of an image, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

PADDING = -1  # the part of tokens that fill rows


@dataclass(frozen=True)
class Row:
    """One prompt's beginning with several endings.

    beginning: ids up to the input image. image: ids of the input image and everything between it and the reply.
    replies: ids, ends of turn included. Input images are numbered over all rows, in order.
    """

    beginning: list[int]
    image: list[int]
    replies: list[list[int]]


@dataclass(frozen=True)
class Rows:
    """Rows as tensors. All but `targets` [B, L]: ids, positions, parts (0: the beginning), which tokens are images.

    targets: which tokens are replies. Shape: [B, L], bool.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    parts: torch.Tensor
    images: torch.Tensor
    targets: torch.Tensor


def lay_out(rows: Sequence[Row], image_token: int, pad: int) -> Rows:
    """Put rows side by side, right-padded."""
    ids, positions, parts, targets = [], [], [], []
    for row in rows:
        endings = [row.image + reply for reply in row.replies]
        lengths = [len(row.beginning), *map(len, endings)]
        ids.append(torch.tensor(sum(endings, row.beginning)))
        starts = [0] + [len(row.beginning)] * len(endings)
        positions.append(torch.cat([torch.arange(n) + start for n, start in zip(lengths, starts, strict=True)]))
        parts.append(torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)))
        targets.append((parts[-1] > 0) & (positions[-1] >= len(row.beginning) + len(row.image)))
    padded = pad_sequence(ids, batch_first=True, padding_value=pad)
    return Rows(
        padded,
        pad_sequence(positions, batch_first=True),
        pad_sequence(parts, batch_first=True, padding_value=PADDING),
        padded == image_token,
        pad_sequence(targets, batch_first=True, padding_value=False),
    )


def masks(rows: Rows, window: int) -> dict[str, torch.Tensor]:
    """Who sees whom, for each kind of layer of Gemma 3: causal, an image's tokens both ways, at most `window` back.

    Shape: [B, 1, L, L], bool.
    """
    part, place = rows.parts, rows.positions
    own = part[:, :, None] == part[:, None]  # padding sees padding, because a row of a mask must not be empty
    block = own & rows.images[:, :, None] & rows.images[:, None]
    before = place[:, None] <= place[:, :, None]
    near = place[:, :, None] - place[:, None] < window
    full = (own | (part == 0)[:, None]) & (before | block)
    return {"full_attention": full[:, None], "sliding_attention": (full & near)[:, None]}


def reply_loss(model: Any, rows: Rows, bank: torch.Tensor | None, features: torch.Tensor, first: int) -> torch.Tensor:
    """Mean cross-entropy of the reply tokens, in nats.

    Args:
        model: A `Gemma3ForConditionalGeneration`.
        rows: The episodes; ids from `first` on are categories, entry e's row j being `first + e * m + j`.
        bank: Category embeddings; None: the rows have no categories. Shape: [E, m, D].
        features: Embeddings of the input images, in the order of the rows. Shape: [images, m, D].
        first: Number of rows of the model's vocabulary.
    """
    category = rows.ids >= first
    embedded = model.get_input_embeddings()(rows.ids.where(~category, 0))  # [B, L, D]
    if bank is not None:
        entries = bank.flatten(0, 1)[(rows.ids - first).clamp(min=0)]
        embedded = torch.where(category[..., None], entries, embedded)
    embedded = embedded.masked_scatter(rows.images[..., None], features)
    hidden = model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=masks(rows, model.config.text_config.sliding_window),
        position_ids=rows.positions,
        use_cache=False,
    ).last_hidden_state
    predictor = torch.roll(rows.targets, -1, dims=1)  # a reply's first token follows its image's part
    return F.cross_entropy(model.lm_head(hidden[predictor]), rows.ids[rows.targets])
