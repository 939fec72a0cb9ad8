"""Shared-prefix attention: two or three dense attention calls and no L x L mask.

Prompts attend to themselves, causally except inside an image where the family says so. Every completion attends to its
own prompt and, causally, to itself. Layers with a sliding window see only that much. The function is registered with
transformers' AttentionInterface as `shared_prefix`, so no modelling code is patched; without a layout it is ordinary
scaled-dot-product attention with transformers' own masks.

Exact for models without dropout: the same sums as in the plain computation, in another order.

A completion attends to its prompt's keys and to its own, in one of two ways. `copy` concatenates them for every
completion: S (W + R) keys and values, on a GPU for each of H heads, since its kernels with a mask support no grouped
heads. `merge` leaves the keys where they are and merges two attention outputs (merged_attention.py). `auto`
chooses by `merges`.

Shapes: H query heads, K key heads, D head size; N, S, P, R, L as in common/forward/packing.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from common.forward.merged_attention import merged_attention
from common.forward.packing import SharedPrefix

NAME = "shared_prefix"
IN_CACHE = 2**22  # bytes of copied keys and values that still fit into a cache
WORTHWHILE = 1.5  # copied keys per token of the row, from which on merging pays
NAMES = {"auto": NAME, "copy": f"{NAME}_copy", "merge": f"{NAME}_merge"}


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    shared_prefix: SharedPrefix | None = None,
    how: str = "auto",
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by the shared layout; the signature is transformers'.

    Shape: query [1, H, L, D], key and value [1, K, L, D] -> [1, L, H, D].
    """
    if shared_prefix is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    # 1. Prompts among themselves: gather them from the row into a padded batch.
    layout, grouped = shared_prefix, query.device.type == "cpu"
    prefix_q, prefix_k, prefix_v = (_take(x, layout.prefix_index) for x in (query, key, value))  # [N, heads, P, D]
    mask = layout.prefix_mask(sliding_window)
    # No mask means causal: right padding is in the future of every real token, so causality hides it as well.
    if mask is None:
        prefix = F.scaled_dot_product_attention(
            prefix_q, prefix_k, prefix_v, is_causal=True, scale=scaling, enable_gqa=query.shape[1] > key.shape[1]
        )
    else:
        prefix = masked_attention(prefix_q, prefix_k, prefix_v, mask, scaling, grouped)
    # 2. Completions to their prompts' keys and to their own.
    suffix_q, suffix_k, suffix_v = (_take(x, layout.suffix_index) for x in (query, key, value))  # [S, heads, R, D]
    visible, mask = layout.suffix_keys(sliding_window)
    if visible is not layout.prefix_index:  # sliding window: only the end of the prompt is visible
        prefix_k, prefix_v = _take(key, visible), _take(value, visible)
    # Number of keys that `copy` would create, and bytes of a key with its value over all heads it copies them for.
    if how == "auto":
        copied, heads = len(suffix_q) * (visible.shape[1] + suffix_q.shape[2]), (key if grouped else query).shape[1]
        size = 2 * heads * query.shape[-1] * query.element_size()
        how = "merge" if merges(copied, query.shape[2], size) else "copy"
    if how == "merge":
        seen = layout.seen_apart(sliding_window, query.shape[1] // key.shape[1], query.dtype)
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        suffix = merged_attention(suffix_q, (prefix_k, prefix_v), (suffix_k, suffix_v), seen, factor)
    else:
        # suffix_owner repeats a prompt's keys for each of its completions: [S, heads, W + R, D]
        keys, values = (
            torch.cat([before[layout.suffix_owner], own], 2)
            for before, own in ((prefix_k, suffix_k), (prefix_v, suffix_v))
        )
        suffix = masked_attention(suffix_q, keys, values, mask, scaling, grouped)
    # 3. Back from two padded batches to the order of the row; padding is dropped.
    flat = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in (prefix, suffix)])  # [N P + S R, H, D]
    return flat[layout.restore][None], None


def merges(copied: int, tokens: int, size: int) -> bool:
    """Return whether `auto` merges instead of copying keys.

    A layer of Qwen2-VL-2B saves 69 bytes per token and width for its backward pass in bf16, and 4 more for every copied
    key. A group of four with a prompt of 700 tokens copies 3.9 keys per token, which is 18 % of all that the layer
    saves; below 1.5 it is under 8 % (docs/performance.md). Copies that fit into a cache cost less than the calls that
    merging adds.

    Args:
        copied: Number of keys that completions attend to, summed over completions.
        tokens: Number of tokens of the row.
        size: Bytes of a key with its value, in all heads for which they would be copied.
    """
    return copied * size > IN_CACHE and copied >= WORTHWHILE * tokens


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    grouped: bool,
) -> torch.Tensor:
    """Attention of H query heads to K key heads, each of which serves H / K consecutive query heads.

    `grouped`: do not copy keys for the query heads. On the CPU the copies are slow; on a GPU the kernel that avoids
    them is slow where there is a mask.

    Shape: query [B, H, Q, D], key and value [B, K, W, D], mask broadcast over [B, H, Q, W] -> [B, H, Q, D].
    """
    if not grouped:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    shared = query.shape[1] > key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=shared)


def merge_error(model: Any, layout: SharedPrefix) -> tuple[float, float]:
    """Measure how far merged attention and its gradients are from exact ones, on this device in its number format.

    Merging calls kernels in a way that PyTorch does not promise to support (merged_attention.py), and a wrong
    gradient would not show in any log-probability. Inputs are random, with the sizes of a real row; the exact result is
    computed with copies in fp32.

    Args:
        model: A `*ForConditionalGeneration`, or the PEFT model around one.
        layout: Layout of a row.

    Returns:
        The largest relative error of output and gradients, and the error of `copy` beside it; (0, 0) if nothing merges.
    """
    text = model.config.get_text_config()
    if text._attn_implementation == NAMES["copy"]:
        return 0.0, 0.0
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    kept = {
        (text.sliding_window if kind == "sliding_attention" else None, _shape(layer))
        for layer, kind in zip(text.per_layer_config, kinds, strict=True)
    }
    device, generator = layout.restore.device, torch.Generator().manual_seed(0)
    errors = [(0.0, 0.0)]
    # one check per kind of layer: full attention and each sliding window
    for window, (heads, own, size) in kept:
        shapes = [(1, each, len(layout.restore), size) for each in (heads, own, own)]
        rows = [torch.randn(shape, generator=generator).to(device, model.dtype) for shape in shapes]
        grad = torch.randn(1, *shapes[0][2:0:-1], size, generator=generator).to(device, model.dtype)

        @torch.enable_grad()
        def attended(how: str, dtype: torch.dtype, window: int | None = window) -> list[torch.Tensor]:
            leaves = [row.to(dtype).requires_grad_() for row in rows]  # noqa: B023
            query, key, value = leaves
            out, _ = shared_prefix_attention(
                torch.nn.Identity(), query, key, value, None, None, window, shared_prefix=layout, how=how
            )
            return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]  # noqa: B023

        # promote_types: fp32, or fp64 if the model is in fp64
        exact = attended("copy", torch.promote_types(torch.float32, model.dtype))
        merged, copied = (
            max(float((a.to(b) - b).norm() / b.norm()) for a, b in zip(attended(how, model.dtype), exact, strict=True))
            for how in ("merge", "copy")
        )
        errors.append((merged, copied))
    return max(errors)


def _shape(layer: Any) -> tuple[int, int, int]:
    """Return the query heads, key heads and head size of a layer with this configuration."""
    size = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return layer.num_attention_heads, layer.num_key_value_heads, size


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather tokens of a packed row into a padded batch. Shape: [1, heads, L, D], [B, W] -> [B, heads, W, D]."""
    heads, _, size = x.shape[1:]
    return x[0].index_select(1, index.flatten()).view(heads, *index.shape, size).transpose(0, 1)


def install(model: Any, how: str | None = None) -> None:
    """Let the language model attend by this function.

    Args:
        model: A `*ForConditionalGeneration`, or the PEFT model around one.
        how: A key of `NAMES`; None: keep what is installed, else `auto`.
    """
    text = model.config.get_text_config()
    if how is not None or text._attn_implementation not in NAMES.values():
        text._attn_implementation = NAMES[how or "auto"]


# Registering sdpa_mask under the same names lets transformers build its usual masks for forwards without a layout.
for _how, _name in NAMES.items():
    AttentionInterface.register(_name, partial(shared_prefix_attention, how=_how))
    AttentionMaskInterface.register(_name, sdpa_mask)
