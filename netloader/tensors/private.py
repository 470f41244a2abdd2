"""Plain copies of tensors that are in a device's private memory format.

The blocks of such a tensor are views of its plain copy. The copy is made when a block is first read or filled. All
blocks of the tensor that are in use share it, and it is freed with the last of them. So only a few tensors take memory
twice.
"""

from __future__ import annotations

import threading
from weakref import WeakValueDictionary

import torch

from netloader.codecs.npu_formats import from_plain, to_plain

__all__ = ["PlainCopies", "PlainCopy"]


class PlainCopy:
    """The plain copy of one tensor. Thread-safe."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._lock = threading.Lock()
        self._plain: torch.Tensor | None = None

    def rows(self) -> torch.Tensor:
        """The bytes of the copy, as a one-dimensional ``uint8`` tensor."""
        return self._made().reshape(-1).view(torch.uint8)

    def write_back(self) -> None:
        """Convert the copy back into the tensor, in place. Waits for the device.

        Bytes that were not filled yet keep their values.
        """
        with self._lock:
            if self._plain is not None:
                from_plain(self._plain, self._tensor)
                _finish(self._tensor.device)

    def _made(self) -> torch.Tensor:
        with self._lock:
            if self._plain is None:
                self._plain = to_plain(self._tensor)
                _finish(self._tensor.device)  # other threads use other streams
            return self._plain


class PlainCopies:
    """The plain copies of one set of tensors that are in use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used: WeakValueDictionary[int, PlainCopy] = WeakValueDictionary()

    def of(self, index: int, tensor: torch.Tensor) -> PlainCopy:
        """The copy of `tensor`, number `index` of the set: the existing one if it is in use, otherwise a new one."""
        with self._lock:
            copy = self._used.get(index)
            if copy is None:
                copy = self._used[index] = PlainCopy(tensor)
            return copy


def _finish(device: torch.device) -> None:
    torch.get_device_module(device.type).current_stream().synchronize()
