"""Operators of the simulated device: each runs on CPU tensors that share its tensors' memory."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

from . import _memory as memory
from ._formats import from_cpu, to_cpu, write_back
from ._streams import streams

_libraries: list[torch.library.Library] = []  # operators are removed with the object that registered them


def is_npu(x: object) -> bool:
    """Whether it is a tensor of this device."""
    return isinstance(x, torch.Tensor) and x.device.type == "npu"


class _Call:
    """One operator's call, translated to the CPU and back."""

    def __init__(self, op: Any) -> None:
        self.op = op
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.outs: dict[str, torch.Tensor] = {}
        self.index: int | None = None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for argument in self.op._schema.arguments:
            if argument.is_out and is_npu(kwargs.get(argument.name)):
                theirs = kwargs[argument.name]  # may be resized: the operator on the CPU gets its own tensor
                self.outs[argument.name] = theirs
                self.index = theirs.device.index
                kwargs[argument.name] = torch.empty(theirs.shape, dtype=theirs.dtype)
        flat, spec = pytree.tree_flatten((args, kwargs))
        cpu_args, cpu_kwargs = pytree.tree_unflatten([self._down(x) for x in flat], spec)
        result = self.op(*cpu_args, **cpu_kwargs)
        if any(a.alias_info is not None and a.alias_info.is_write for a in self.op._schema.arguments):
            for tensor, cpu in self.pairs:
                write_back(tensor, cpu)
        for name, out in self.outs.items():  # last: an in-place operator has its own tensor among its inputs
            made = cpu_kwargs[name]
            if out.shape != made.shape:
                stride = memory.row_major(made.shape)
                out.data = memory.allocate(made.shape, stride, out.dtype, out.device.index)
            cpu = to_cpu(out)
            write_back(out, cpu.copy_(made))
        named = [(cpu_kwargs[name], out) for name, out in self.outs.items()]
        return pytree.tree_map(lambda x: self._up(x, named), result)

    def _down(self, x: Any) -> Any:
        if is_npu(x):
            self.index = x.device.index if self.index is None else self.index
            cpu = to_cpu(x)
            self.pairs.append((x, cpu))
            return cpu
        if isinstance(x, torch.device) and x.type == "npu":
            self.index = x.index or 0
            return torch.device("cpu")
        return x

    def _up(self, x: Any, named: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        if not isinstance(x, torch.Tensor) or x.device.type != "cpu" or self.index is None:
            return x
        for cpu, tensor in named:
            if x is cpu:
                return tensor
        for tensor, cpu in self.pairs:
            if x is cpu:
                return tensor
        for tensor, _ in self.pairs:
            if x.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() and x.numel():
                return memory.restride(tensor, x.dtype, x.shape, x.stride(), int(x.storage_offset()))
        return from_cpu(x, self.index)


def _fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    streams.current().drain()
    return _Call(op).run(args, kwargs)


def _index(device: torch.device | None) -> int:
    return streams.device if device is None or device.index is None else device.index


def _empty(size: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
    return memory.allocate(size, memory.row_major(size), dtype or torch.get_default_dtype(), _index(device))


def _empty_strided(
    size: Sequence[int], stride: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any
) -> torch.Tensor:
    return memory.allocate(size, stride, dtype or torch.get_default_dtype(), _index(device))


def _copy_from(source: torch.Tensor, into: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    streams.current().drain()
    values = to_cpu(source) if is_npu(source) else source
    if is_npu(into):
        cpu = to_cpu(into)
        cpu.copy_(values)
        write_back(into, cpu)
    else:
        into.copy_(values)
    return into


def _resize(self: torch.Tensor, size: Sequence[int], *, memory_format: object = None) -> torch.Tensor:
    if list(size) != list(self.shape):
        larger = memory.allocate(size, memory.row_major(size), self.dtype, self.device.index)
        n = min(self.numel(), larger.numel())
        memory.alias(larger).flatten()[:n].copy_(to_cpu(self).contiguous().flatten()[:n])
        self.data = larger
    return self


def _set(self: torch.Tensor, source: Any, offset: int, size: Sequence[int], stride: Sequence[int] = ()) -> torch.Tensor:
    # The CPU kernel only changes pointers.
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    op = torch.ops.aten.set_.source_Storage_storage_offset
    done: torch.Tensor = op.redispatch(keys, self, source, offset, size, stride)
    return done


def install(module: types.ModuleType) -> None:
    """Make ``npu`` a device of this process."""
    untyped: Any = torch  # most of what follows has no types
    untyped.utils.rename_privateuse1_backend("npu")
    untyped._register_device_module("npu", module)
    untyped.utils.generate_methods_for_privateuse1_backend()
    hooks, dummies = untyped._C._acc, cast("Any", backend_registration)
    hooks.register_python_privateuseone_hook(dummies._DummyPrivateUse1Hook())
    hooks.register_python_privateuseone_device_guard(dummies._DummyDeviceGuard())
    aten = untyped.library.Library("aten", "IMPL")
    aten.impl("empty.memory_format", _empty, "PrivateUse1")
    aten.impl("empty_strided", _empty_strided, "PrivateUse1")
    aten.impl("_copy_from", _copy_from, "PrivateUse1")
    aten.impl("resize_", _resize, "PrivateUse1")
    aten.impl("set_.source_Storage_storage_offset", _set, "PrivateUse1")
    every = untyped.library.Library("_", "IMPL")
    every.fallback(_fallback, "PrivateUse1")
    _libraries.extend([aten, every])
