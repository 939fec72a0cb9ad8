"""Shared-prefix attention: two dense attention calls and no L x L mask.

The prompts attend among themselves, causally except inside an image where the family says so; every completion attends
to its own prompt and, causally, to itself. Layers with a sliding window see only that much.
Registered with transformers' AttentionInterface under `shared_prefix`, so no modelling code is patched; without a
layout it is ordinary scaled-dot-product attention with transformers' own masks.

Exact for models without dropout: the same sums as the plain computation, in another order.

Shapes: H query heads, K key heads, D head size; N, S, P, R, L as in common/forward/layout.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from common.forward.layout import SharedPrefix

NAME = "shared_prefix"


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    shared_prefix: SharedPrefix | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention signature. Shape: query [1, H, L, D], key and value [1, K, L, D] -> [1, L, H, D]."""
    if shared_prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    layout, grouped = shared_prefix, query.device.type == "cpu"
    prefix_q, prefix_k, prefix_v = (_take(x, layout.prefix_index) for x in (query, key, value))  # [N, heads, P, D]
    mask = layout.prefix_mask(sliding_window)
    if mask is None:
        prefix = F.scaled_dot_product_attention(
            prefix_q, prefix_k, prefix_v, is_causal=True, scale=scaling, enable_gqa=query.shape[1] > key.shape[1]
        )
    else:
        prefix = masked_attention(prefix_q, prefix_k, prefix_v, mask, scaling, grouped)
    suffix_q, suffix_k, suffix_v = (_take(x, layout.suffix_index) for x in (query, key, value))  # [S, heads, R, D]
    visible, mask = layout.suffix_keys(sliding_window)
    if visible is not layout.prefix_index:  # inside a window only the end of the prompt counts
        prefix_k, prefix_v = _take(key, visible), _take(value, visible)
    keys, values = (
        torch.cat([before[layout.suffix_owner], own], 2) for before, own in ((prefix_k, suffix_k), (prefix_v, suffix_v))
    )
    suffix = masked_attention(suffix_q, keys, values, mask, scaling, grouped)
    flat = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in (prefix, suffix)])  # [N P + S R, H, D]
    return flat[layout.restore][None], None


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    grouped: bool,
) -> torch.Tensor:
    """Attention of H heads to the keys of K, each of which serves H / K consecutive ones.

    `grouped`: without copies of the keys. On the CPU copies are what is slow; on GPUs the kernel that does without them
    is, where there is a mask.

    Shape: query [B, H, Q, D], key and value [B, K, W, D], mask broadcast over [B, H, Q, W] -> [B, H, Q, D].
    """
    if not grouped:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    shared = query.shape[1] > key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=shared)


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of a packed tensor as a padded batch. Shape: [1, heads, L, D], [B, W] -> [B, heads, W, D]."""
    heads, _, size = x.shape[1:]
    return x[0].index_select(1, index.flatten()).view(heads, *index.shape, size).transpose(0, 1)


def install(model: Any) -> None:
    """Let the language model attend by this function: a `*ForConditionalGeneration`, or the PEFT model around one."""
    model.config.get_text_config()._attn_implementation = NAME


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
