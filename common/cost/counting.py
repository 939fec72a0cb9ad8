"""Bytes and floating-point operations of a computation, counted from the shapes of its tensors: nothing is computed.

Weights and activations are tensors of the `meta` device, which have a shape and no content. Token ids, positions and
masks stay real, since the layout depends on their values. So the model's own code runs forward and backward at any
size, on any machine, in seconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

META = torch.device("meta")


class ShapeCounter(TorchDispatchMode):
    """A context in which operations on meta tensors are counted, as a GPU would run them.

    torch.utils.flop_counter.FlopCounterMode is not used because it keeps the activations of all modules alive.

    Attributes:
        live: Bytes of the meta tensors that exist now.
        peak: The largest `live` so far.
        flops: Multiplications and additions of matrix products, convolutions and attention; a pair counts two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __enter__(self) -> ShapeCounter:
        # a TorchFunctionMode would not see what checkpoints compute again in a backward
        self.attention, F.scaled_dot_product_attention = F.scaled_dot_product_attention, self._attention
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        F.scaled_dot_product_attention = self.attention

    def _attention(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attention by the kernels that a GPU would take. PyTorch has no rule for the meta device and would take the
        plain sums, with all scores in fp32.
        """
        attention = _fused_attention if query.device == META else self.attention
        return attention(query, *args, **kwargs)

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor from now until it is freed; another view of the same memory adds nothing."""
        storage = tensor.untyped_storage()
        if storage not in self.known:
            size = self.known[storage] = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(map(_is_meta, tree_leaves((args, kwargs)))):
            args, kwargs = tree_map(_shape_of, (args, kwargs))  # a real mask beside meta tensors
        out = func(*args, **kwargs)
        made = [value for value in tree_leaves(out) if _is_meta(value)]
        for tensor in made:
            self.add(tensor)
        count = flop_registry.get(func._overloadpacket)
        if made and count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        return out


def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The signature of `scaled_dot_product_attention`. The flash kernel takes no mask but fewer key heads; the
    memory-efficient one takes a mask, as numbers to add, and needs as many key heads.
    """
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]
    if enable_gqa:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    shape = (*query.shape[:-1], key.shape[-2])
    added = attn_mask.to(META).to(query.dtype).expand(shape)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, added, True, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device == META


def _shape_of(value: Any) -> Any:
    return value.to(META) if isinstance(value, torch.Tensor) and value.device != META else value
