"""A pretend device: tensors that compute on the CPU, say that they are elsewhere, and refuse to be mixed with the CPU's.

It finds what a GPU would refuse: an index, a mask or a constant that was left on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")  # a kind that PyTorch knows and that computes nothing by itself
aten = torch.ops.aten
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)


class Pretend(torch.Tensor):
    """A tensor there; `held` are its values on the CPU."""

    @staticmethod
    def __new__(cls, real):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            layout=real.layout,
            device=DEVICE,
            requires_grad=real.requires_grad,
        )

    def __init__(self, real):
        self.held = real

    def tolist(self):
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class There(TorchDispatchMode):
    """Inside, tensors can be made on the pretend device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def real(value):
    return value.held if isinstance(value, Pretend) else value


def pretended(value):
    return Pretend(value) if isinstance(value, torch.Tensor) and not isinstance(value, Pretend) else value


def computed(func, args, kwargs):
    """What an operation gives, on the device where a GPU would have it.

    Raises:
        RuntimeError: Tensors of both places meet.
    """
    if func is aten._fused_sdp_choice.default:
        return 0
    if func is torch.ops.prim.device.default:
        return DEVICE
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Pretend)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Pretend) and tensor.dim() > 0]
    asked = kwargs.pop("device", None) if "device" in kwargs else None
    goes = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
    if "device" in {argument.name for argument in func._schema.arguments} and (asked is not None or not tensors):
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": None}
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    copies = func in (aten._to_copy.default, aten.copy_.default)
    if there and here and not copies and not (func in INDEXED and isinstance(args[0], Pretend)):
        raise RuntimeError(f"{func} of tensors on both devices: {[tuple(tensor.shape) for tensor in here]} on the CPU")
    out = func(*tree_map(real, args), **tree_map(real, kwargs))
    if func is aten._local_scalar_dense.default or not goes:
        return args[0] if func is aten.copy_.default else out
    writes = any(each.alias_info is not None and each.alias_info.is_write for each in func._schema.returns)
    return args[0] if writes else tree_map(pretended, out)


def move(module):
    """Put a module's parameters and buffers there; parameters that were shared still are."""
    moved = {}
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None and not isinstance(parameter, Pretend):
                if id(parameter) not in moved:
                    new = torch.nn.Parameter(Pretend(parameter.detach()), requires_grad=parameter.requires_grad)
                    moved[id(parameter)] = (parameter, new)  # the first is kept, so that no other gets its id
                each._parameters[name] = moved[id(parameter)][1]
        for name, buffer in each._buffers.items():
            if buffer is not None and not isinstance(buffer, Pretend):
                each._buffers[name] = Pretend(buffer)
    return module


def made(make):
    """`torch.tensor` and `torch.as_tensor`, which do not come by a dispatch mode."""

    def tensor(data, *args, device=None, **kwargs):
        if device is None or torch.device(device).type != DEVICE.type:
            return make(data, *args, **({} if device is None else {"device": device}), **kwargs)
        if isinstance(data, Pretend):
            return data.to(kwargs["dtype"]) if kwargs.get("dtype") else data
        return Pretend(make(tree_map(real, data), *args, device="cpu", **kwargs))

    return tensor
