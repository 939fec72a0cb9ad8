"""What a computation would allocate and how many operations it takes, from shapes alone: nothing is computed.

Weights and activations are tensors of the `meta` device, which have a shape and no content; token ids, positions and
masks stay real, since the layout depends on their values. So the model's own code runs, forward and backward, at any
size, on any machine and in seconds. Attention takes the kernels that it takes on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

META = torch.device("meta")
FLASH, EFFICIENT = 1, 2  # torch's numbers of the kernels without a matrix of scores; only the second takes a mask


class OnPaper(TorchDispatchMode):
    """Inside, operations on meta tensors are counted.

    live, peak: bytes of meta tensors that exist, now and at most. Tensors from outside count from when they are first
    seen, see `holds`. flops: multiplications and additions of matrix products and attention, two per pair.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.seen: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    def holds(self, tensor: torch.Tensor) -> None:
        """Count a tensor from now until it is freed."""
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            size = self.seen[storage] = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._fused_sdp_choice.default:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            return FLASH if mask is None else EFFICIENT
        if any(is_meta(value) for value in tree_leaves((args, kwargs))):
            args, kwargs = tree_map(_shape_of, (args, kwargs))
        out = func(*args, **kwargs)
        made = [value for value in tree_leaves(out) if is_meta(value)]
        for tensor in made:
            self.holds(tensor)
        count = flop_registry.get(func._overloadpacket)
        if made and count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        return out


def is_meta(value: Any) -> bool:
    """Whether it is a tensor without content."""
    return isinstance(value, torch.Tensor) and value.device == META


def _shape_of(value: Any) -> Any:
    """A real tensor without its content."""
    return value.to(META) if isinstance(value, torch.Tensor) and value.device != META else value
