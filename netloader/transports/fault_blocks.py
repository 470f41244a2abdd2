"""Copies of blocks, which can be changed without changing the caller's memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from netloader.codecs.regions import Regions, regions_of
from netloader.errors import TransportUnavailable
from netloader.transports.base import BlockView

if TYPE_CHECKING:
    import torch

__all__ = ["copy_of", "flip", "head"]


class _Bytes:
    """A block in a Python object's memory."""

    def __init__(self, number: int, spans: Sequence[bytearray]) -> None:
        self.number = number
        self.nbytes = sum(map(len, spans))
        self._spans = spans

    def tensors(self) -> Sequence[torch.Tensor]:
        import torch

        empty = torch.empty(0, dtype=torch.uint8)  # frombuffer takes no empty buffer
        return [torch.frombuffer(span, dtype=torch.uint8) if span else empty for span in self._spans]

    def buffers(self) -> Sequence[memoryview]:
        return [memoryview(span) for span in self._spans]

    def regions(self) -> Regions[int]:
        return regions_of(self.buffers())

    def settle(self) -> None:
        """Nothing to do."""


class _Tensors:
    """A block in its own tensors on a device."""

    def __init__(self, number: int, spans: Sequence[torch.Tensor]) -> None:
        self.number = number
        self.nbytes = sum(map(len, spans))
        self._spans = spans

    def tensors(self) -> Sequence[torch.Tensor]:
        return self._spans

    def buffers(self) -> Sequence[memoryview]:
        raise TransportUnavailable(f"block {self.number} is not in the CPU's memory")

    def regions(self) -> Regions[int]:
        return regions_of(self.buffers())

    def settle(self) -> None:
        """Nothing to do."""


def copy_of(block: BlockView) -> BlockView:
    """A copy of a block on the same device."""
    try:
        return _Bytes(block.number, [bytearray(buffer) for buffer in block.buffers()])
    except TransportUnavailable:
        return _Tensors(block.number, [tensor.clone() for tensor in block.tensors()])


def head(block: BlockView, nbytes: int) -> BlockView:
    """A copy of the first `nbytes` bytes."""
    whole = copy_of(block)
    kept: list[Any] = []
    for span in whole.buffers() if isinstance(whole, _Bytes) else whole.tensors():
        if nbytes > 0:
            kept.append(bytearray(span[:nbytes]) if isinstance(whole, _Bytes) else span[:nbytes])
        nbytes -= len(span)
    return _Bytes(block.number, kept) if isinstance(whole, _Bytes) else _Tensors(block.number, kept)


def flip(block: BlockView, byte: int) -> None:
    """Flip the lowest bit of one byte of a block, in place. Does nothing when the block has no such byte."""
    spans: Sequence[Any]
    span: Any  # a memoryview or a tensor: they index alike
    try:
        spans = block.buffers()
    except TransportUnavailable:
        spans = block.tensors()
    for span in spans:
        if byte < len(span):
            span[byte] ^= 1
            return
        byte -= len(span)
