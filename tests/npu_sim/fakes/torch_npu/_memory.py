"""Memory of the simulated device: hidden CPU tensors, imported as storages of the ``npu`` device.

A DLPack capsule whose device type is kDLExtDev becomes a storage of PyTorch's PrivateUse1 key. So tensors are plain
`torch.Tensor` objects with a real storage, a real address, and views that share memory.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch

ND = 2
DEVICES = 4
_EXT_DEVICE = 12
_UNLIMITED = 64 << 30


class _DLDevice(ctypes.Structure):
    _fields_: ClassVar[Any] = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DLDataType(ctypes.Structure):
    _fields_: ClassVar[Any] = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _DLTensor(ctypes.Structure):
    _fields_: ClassVar[Any] = (
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", _DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    pass


_Deleter: Any = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_DLManagedTensor._fields_ = (("dl_tensor", _DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", _Deleter))
_capsule: Any = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Accounts:
    """Bytes in use on each device, and a limit that tests can set."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.limit = _UNLIMITED
        self.used = [0] * DEVICES

    def take(self, index: int, nbytes: int) -> None:
        """Account for an allocation.

        Raises:
            RuntimeError: The device is full.
        """
        with self._lock:
            if self.used[index] + nbytes > self.limit:
                free = self.limit - self.used[index]
                raise RuntimeError(f"NPU out of memory. Tried to allocate {nbytes} bytes (NPU {index}; {free} free)")
            self.used[index] += nbytes

    def give(self, index: int, nbytes: int) -> None:
        """Account for freed memory."""
        with self._lock:
            self.used[index] -= nbytes


class Pool(Protocol):
    """Where memory comes from, if not from this module: see `_pools`."""

    def rounded(self, nbytes: int) -> int:
        """The bytes that it allocates for so many."""
        ...

    def allocate(self, nbytes: int, index: int) -> torch.Tensor:
        """Bytes of the host."""
        ...

    def free(self, buffer: torch.Tensor) -> bool:
        """Take them back; returns whether they are accounted for."""
        ...


class Route(threading.local):
    """Where this thread's allocations come from."""

    pool: Pool | None = None


accounts = Accounts()
route = Route()
formats: dict[int, int] = {}  # address of a storage -> private format
_blocks: dict[int, tuple[Any, ...]] = {}  # address of a managed tensor -> what it keeps alive


@_Deleter  # type: ignore[untyped-decorator]
def _free(managed: Any) -> None:
    block = _blocks.pop(ctypes.addressof(managed.contents), None)
    if block is not None:
        _, _, _, buffer, index, pool = block
        formats.pop(buffer.data_ptr(), None)
        if pool is None or pool.free(buffer):
            accounts.give(index, buffer.numel())


def _raw(nbytes: int, index: int) -> torch.Tensor:
    pool, nbytes = route.pool, max(nbytes, 1)
    taken = nbytes if pool is None else pool.rounded(nbytes)
    accounts.take(index, taken)
    buffer = torch.zeros(taken, dtype=torch.uint8) if pool is None else pool.allocate(taken, index)
    shape, strides = (ctypes.c_int64 * 1)(nbytes), (ctypes.c_int64 * 1)(1)
    managed: Any = _DLManagedTensor()
    device, dtype = _DLDevice(_EXT_DEVICE, index), _DLDataType(1, 8, 1)
    managed.dl_tensor = _DLTensor(buffer.data_ptr(), device, 1, dtype, shape, strides, 0)
    managed.manager_ctx, managed.deleter = None, _free
    _blocks[ctypes.addressof(managed)] = (managed, shape, strides, buffer, index, pool)
    made: torch.Tensor = torch._C._from_dlpack(_capsule(ctypes.addressof(managed), b"dltensor", None))
    return made


def restride(
    base: torch.Tensor, dtype: torch.dtype, size: Sequence[int], stride: Sequence[int], offset: int
) -> torch.Tensor:
    """A tensor of the given geometry on the storage of `base`: a true view."""
    aten = torch.ops.aten
    with torch._C._AutoDispatchBelowADInplaceOrView():
        out = aten.alias.default(base)
        if out.dtype != dtype:
            whole = base.untyped_storage().nbytes()
            aten.as_strided_.default(out, [whole // out.element_size()], [1], 0)
            out = aten.view.dtype(out.view(torch.uint8) if out.dtype != torch.uint8 else out, dtype)
        made: torch.Tensor = aten.as_strided_.default(out, list(size), list(stride), offset)
        return made


def row_major(size: Sequence[int]) -> list[int]:
    """Strides of a contiguous tensor."""
    out: list[int] = []
    step = 1
    for n in reversed(size):
        out.append(step)
        step *= max(n, 1)
    return out[::-1]


def allocate(
    size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, index: int, nbytes: int | None = None
) -> torch.Tensor:
    """A new tensor on device `index`; `nbytes` if its format needs more than its elements."""
    item = dtype.itemsize
    if nbytes is None:
        span = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        nbytes = span * item
    nbytes = -(-max(nbytes, item) // item) * item
    return restride(_raw(nbytes, index), dtype, size, stride, 0)


def _aliased(tensor: torch.Tensor) -> Any:
    storage = tensor.untyped_storage()
    return torch._C._construct_storage_from_data_pointer(storage.data_ptr(), torch.device("cpu"), storage.nbytes())


def storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage of a device tensor as CPU bytes; the same memory."""
    return torch.empty(0, dtype=torch.uint8).set_(_aliased(tensor), 0, (tensor.untyped_storage().nbytes(),), (1,))


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor on the memory of a device tensor of base format."""
    empty = torch.empty(0, dtype=tensor.dtype)
    return empty.set_(_aliased(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether its strides cover memory without gaps, so that a copy can have the same strides."""
    step = 1
    for have, n in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if have != step:
            return False
        step *= n
    return True


def numel(size: Sequence[int]) -> int:
    """Elements of a shape."""
    return math.prod(size)
