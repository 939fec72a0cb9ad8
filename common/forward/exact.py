"""Compute with the weights as they are, but without rounding to them: the oracle of the self-checks.

In bf16 two correct forwards differ by as much as a wrong mask can change (0.07 to 0.1 nats in Qwen2-VL-2B), so that no
limit on their difference separates the two. With the same weights in fp32 arithmetic correct ones differ by 1e-5, and
every fault of a mask or a position by a thousand times that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

HALF = (torch.bfloat16, torch.float16)


class InFloat32(TorchDispatchMode):
    """Inside, every operation on 16-bit tensors is computed on fp32 copies of them, and results stay fp32.

    Weights are copied for each use and forgotten, so no second model is held. For forwards without gradients.
    Operations of other libraries (8-bit products) are left as they are.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in HALF:
            kwargs["dtype"] = torch.float32
        elif computes(func):
            args, kwargs = tree_map(widened, (args, kwargs))
        return func(*args, **kwargs)


def widened(value: Any) -> Any:
    """A 16-bit tensor as fp32, anything else as it is."""
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALF else value


def computes(func: Any) -> bool:
    """Whether an operation makes new values: no view of its input, nothing written in place."""
    schema = func._schema
    aliases = [each.alias_info for each in (*schema.arguments, *schema.returns)]
    return bool(func.namespace == "aten") and all(alias is None for alias in aliases)
