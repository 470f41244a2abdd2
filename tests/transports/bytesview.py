"""Blocks over plain Python memory: sufficient for transports that use buffers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from netloader.codecs.regions import Regions, regions_of

if TYPE_CHECKING:
    import torch


class BytesView:
    """A block over bytearrays."""

    def __init__(self, number: int, *spans: bytes | bytearray) -> None:
        self.number = number
        self.spans = [span if isinstance(span, bytearray) else bytearray(span) for span in spans]

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.spans))

    @property
    def data(self) -> bytes:
        return b"".join(self.spans)

    def tensors(self) -> Sequence[torch.Tensor]:
        import torch

        return [torch.frombuffer(span, dtype=torch.uint8) if span else torch.empty(0) for span in self.spans]

    def buffers(self) -> Sequence[memoryview]:
        return [memoryview(span) for span in self.spans]

    def regions(self) -> Regions[int]:
        return regions_of(self.buffers())

    def settle(self) -> None:
        pass


class Pieces(BytesView):
    """A block over parts of other objects' memory."""

    def __init__(self, *pieces: memoryview) -> None:
        super().__init__(0)
        self.pieces = pieces

    def buffers(self) -> Sequence[memoryview]:
        return self.pieces


def like(blocks: Sequence[BytesView]) -> list[BytesView]:
    """Empty blocks to receive these into."""
    return [BytesView(block.number, *(bytes(len(span)) for span in block.spans)) for block in blocks]
