"""Attend to two blocks of keys as if they were concatenated, without concatenating them.

All completions of a prompt attend to its keys at once, as the queries of one block, and each to its own tokens. A
softmax over both blocks is the mean of the blocks' softmaxes, weighted by the sums in their denominators:

    LSE = log(exp LSE1 + exp LSE2),    out = exp(LSE1 - LSE) out1 + exp(LSE2 - LSE) out2

The gradient needs no derivative of a log-sum-exp. The backward of a fused kernel computes the probabilities from the
log-sum-exp, p = exp(s - LSE), and the correction of the softmax from the output, ds = p (g v - g out). Given the LSE
and the output of both blocks together, it therefore computes exactly its block's part of the whole gradient (Ring
Attention, arXiv 2310.01889, does the same between devices).

Shapes: S completions of N prompts, at most G of one prompt, H query heads on K key heads, R completion tokens, W prompt
tokens that they see, D head size; B, M and T stand for any batch, its queries and its keys.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

from common.forward.packing import Seen

log = logging.getLogger(__name__)
aten = torch.ops.aten


def merged_attention(
    query: torch.Tensor,
    prompt: tuple[torch.Tensor, torch.Tensor],
    own: tuple[torch.Tensor, torch.Tensor],
    seen: Seen,
    scaling: float,
) -> torch.Tensor:
    """Attend from completions to their prompts and to themselves.

    Args:
        query: Queries of the completions. Shape: [S, H, R, D].
        prompt: Keys and values of the prompts. Shape: [N, K, W, D].
        own: Keys and values of the completions. Shape: [S, K, R, D].
        seen: Masks of both blocks.
        scaling: Factor of the scores.

    Returns:
        Attention output. Shape: [S, H, R, D].
    """
    out: torch.Tensor = _Merged.apply(query, *prompt, *own, seen, scaling)
    return out


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        own_key: torch.Tensor,
        own_value: torch.Tensor,
        seen: Seen,
        scaling: float,
    ) -> torch.Tensor:
        # Two kernel calls: all completions of a prompt as rows of one block, then every completion on itself.
        prompt = Block(fold(query, seen, key.shape[1]), key, value, seen.prompt_bias, False, scaling)
        own = Block(query, own_key, own_value, seen.own_bias, seen.own_bias is None, scaling)
        kernels = kernel(prompt), kernel(own)
        out1, lse1 = (unfold(x, seen, query.shape) for x in kernels[0].forward(prompt))
        out2, lse2 = kernels[1].forward(own)
        # Merge both outputs by their log-sum-exp (formula in the module docstring).
        lse = torch.logaddexp(lse1, lse2)
        out = (out1 * (lse1 - lse).exp()[..., None] + out2 * (lse2 - lse).exp()[..., None]).to(query.dtype)
        ctx.save_for_backward(query, key, value, own_key, own_value, out, lse)
        ctx.kernels, ctx.seen, ctx.scaling = kernels, seen, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, own_key, own_value, out, lse = ctx.saved_tensors
        seen: Seen = ctx.seen
        # Both backward kernels get the merged output and log-sum-exp, not those of their own block: that makes them
        # return their parts of the whole gradient.
        together, *results = (fold(x, seen, key.shape[1]) for x in (query, grad, out, lse))
        prompt = Block(together, key, value, seen.prompt_bias, False, ctx.scaling)
        own = Block(query, own_key, own_value, seen.own_bias, seen.own_bias is None, ctx.scaling)
        of_query, of_key, of_value = ctx.kernels[0].backward(prompt, *results)
        of_own_query, of_own_key, of_own_value = ctx.kernels[1].backward(own, grad, out, lse)
        # A query attends to both blocks, so its gradients add up; keys and values belong to one block each.
        of_query = unfold(of_query, seen, query.shape) + of_own_query
        return of_query, of_key, of_value, of_own_key, of_own_value, None, None


def fold(x: torch.Tensor, seen: Seen, keys: int) -> torch.Tensor:
    """Put all queries of the same keys into one block: H / K heads of G completions of R tokens.

    With one prompt it is a view. Missing completions of a prompt (it has fewer than G) are zero: with a zero gradient
    they add nothing to the gradients of the keys.

    Shape: [S, H, R, ...] -> [N, K, H / K * G * R, ...].
    """
    if seen.members is None:
        rows = x.unflatten(0, (seen.prompts, -1))  # [N, G, H, R, ...]
    else:
        missing = (seen.members < 0).view(*seen.members.shape, *[1] * (x.ndim - 1))
        rows = x[seen.members].masked_fill(missing, 0)
    # [N, G, K, H / K, R, ...] -> [N, K, H / K, G, R, ...] -> rows
    return rows.unflatten(2, (keys, -1)).movedim(1, 3).flatten(2, 4)


def unfold(x: torch.Tensor, seen: Seen, shape: torch.Size) -> torch.Tensor:
    """Undo `fold`. Shape: [N, K, H / K * G * R, ...] -> [S, H, R, ...], where `shape` begins with [S, H, R]."""
    _, heads, tokens, *_ = shape
    rows = x.unflatten(2, (heads // x.shape[1], -1, tokens)).movedim(3, 1).flatten(2, 3)  # [N, G, H, R, ...]
    return rows.flatten(0, 1) if seen.members is None else rows[seen.members >= 0]


@dataclass(frozen=True)
class Block:
    """Inputs of one attention call.

    query: [B, H, M, D].
    key, value: [B, K, T, D], each for H / K consecutive heads.
    bias: added to the scores, broadcast over [B, H, M, T].
    causal: a query sees the keys up to its own number.
    scaling: factor of the scores.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    causal: bool
    scaling: float

    def for_each_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values repeated for the heads that share them. Shape: [B, H, T, D]."""
        repeat = self.query.shape[1] // self.key.shape[1]
        if repeat == 1:
            return self.key, self.value
        return self.key.repeat_interleave(repeat, 1), self.value.repeat_interleave(repeat, 1)

    def of_shared(self, gradient: torch.Tensor) -> torch.Tensor:
        """Sum the gradient of repeated keys or values over the repetitions. Shape: [B, H, T, D] -> [B, K, T, D]."""
        return gradient.unflatten(1, (self.key.shape[1], -1)).sum(2)

    def whole_bias(self) -> torch.Tensor | None:
        """Return the bias expanded to the shape of the scores, without a copy."""
        return None if self.bias is None else self.bias.expand(*self.query.shape[:3], self.key.shape[2])


class Kernel(NamedTuple):
    """A fused attention with its gradient.

    forward: from a block to output [B, H, M, D] and log-sum-exp [B, H, M].
    backward: from a block, the gradient of the output, the output and the log-sum-exp to the gradients of query,
        key and value.
    """

    forward: Callable[[Block], tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[
        [Block, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ]


def kernel(block: Block) -> Kernel:
    """Return the fastest kernel that the device has for a block; without any, plain operations and a warning."""
    query, key, value, device = block.query, block.key, block.value, block.query.device.type
    if device == "cpu":
        return CPU
    if device == "meta":  # nothing is computed: memory and time of a GPU are estimated (common/cost/)
        return FLASH if block.bias is None else EFFICIENT
    if device == "cuda":
        shares = query.shape[1] > key.shape[1]
        # FlashAttention supports grouped heads but no bias; the efficient kernel supports a bias but no grouped heads.
        aligned = query.shape[-1] % 8 == 0
        if aligned and can_use_flash_attention(SDPAParams(query, key, value, block.bias, 0.0, block.causal, shares)):
            return FLASH
        whole = SDPAParams(query, *block.for_each_head(), block.whole_bias(), 0.0, block.causal, False)
        if can_use_efficient_attention(whole):
            return EFFICIENT
    _say_once(f"{device}, {query.dtype}, heads of {query.shape[-1]} numbers")
    return PLAIN


@lru_cache
def _say_once(what: str) -> None:
    log.warning("no fused attention for %s: it is computed in plain steps; model.attention=copy may be faster", what)


def _cpu_forward(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        block.query, block.key, block.value, 0.0, block.causal, attn_mask=block.bias, scale=block.scaling
    )
    return out, lse


def _cpu_backward(
    block: Block, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    of_query, of_key, of_value = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(grad, block.query, block.key, block.value, out, lse, 0.0, block.causal),
        attn_mask=block.bias,
        scale=block.scaling,
    )
    return of_query, of_key, of_value


def _flash_forward(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(
        block.query, block.key, block.value, 0.0, block.causal, scale=block.scaling
    )
    return out, lse


def _flash_backward(
    block: Block, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lengths, none = (block.query.shape[2], block.key.shape[2]), _no_dropout(block)
    of_query, of_key, of_value = aten._scaled_dot_product_flash_attention_backward(
        *(grad, block.query, block.key, block.value, out, lse.contiguous(), None, None, *lengths),
        *(0.0, block.causal, none, none),
        scale=block.scaling,
    )
    return of_query, of_key, of_value


def _efficient_forward(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        block.query, *block.for_each_head(), block.whole_bias(), True, 0.0, block.causal, scale=block.scaling
    )
    # The kernel pads the rows of the log-sum-exp to a multiple of 32.
    return out, lse[..., : block.query.shape[2]]


def _efficient_backward(
    block: Block, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Call the backward of memory-efficient attention, with its inputs in the layout that it assumes without a check.

    It expects rows of the log-sum-exp padded to a multiple of 32, and an output that lies in memory as [B, M, H, D],
    like the results of its forward. Padding with infinity makes the probabilities of padded rows zero: exp(s - inf) =
    0.
    """
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf).contiguous()
    out, none = out.transpose(1, 2).contiguous().transpose(1, 2), _no_dropout(block)
    wanted = [True, True, True, False]  # gradients of query, key and value, not of the bias
    of_query, of_keys, of_values, _ = aten._scaled_dot_product_efficient_attention_backward(
        *(grad, block.query, *block.for_each_head(), block.whole_bias(), out, lse, none, none, 0.0, wanted),
        block.causal,
        scale=block.scaling,
    )
    return of_query, block.of_shared(of_keys), block.of_shared(of_values)


def _no_dropout(block: Block) -> torch.Tensor:
    """Return an empty tensor for the random state, which no kernel reads without dropout."""
    return block.query.new_empty(0, dtype=torch.long)


def _scores(block: Block, keys: torch.Tensor) -> torch.Tensor:
    scores = block.scaling * block.query @ keys.mT  # [B, H, M, T]
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if block.causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    return scores if block.bias is None else scores + block.bias


def _plain_forward(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = block.for_each_head()
    scores = _scores(block, keys)
    return scores.softmax(-1).to(values.dtype) @ values, scores.logsumexp(-1)


def _plain_backward(
    block: Block, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys, values = block.for_each_head()
    # The formulas of the module docstring: p = exp(s - LSE), ds = p (g v - g out).
    p = (_scores(block, keys) - lse[..., None]).exp()
    correction = (grad.to(p) * out.to(p)).sum(-1, keepdim=True)
    ds = (block.scaling * p * ((grad @ values.mT).to(p) - correction)).to(grad.dtype)
    return ds @ keys, block.of_shared(ds.mT @ block.query), block.of_shared(p.to(grad.dtype).mT @ grad)


CPU = Kernel(_cpu_forward, _cpu_backward)
FLASH = Kernel(_flash_forward, _flash_backward)
EFFICIENT = Kernel(_efficient_forward, _efficient_backward)
PLAIN = Kernel(_plain_forward, _plain_backward)
