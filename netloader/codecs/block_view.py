"""A block in memory, as transports, hashing, packing and staging access it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from netloader.codecs.regions import Regions, regions_of

if TYPE_CHECKING:
    import torch

__all__ = ["BlockView"]


class BlockView(Protocol):
    """The bytes of one block in the memory of the caller's tensors, without a copy.

    When sending, the bytes may be computed by the first call of `tensors`, `buffers` or `regions`, in memory that the
    view owns. So the call may take long, and the memory is valid for as long as the view exists: the caller of `send`
    keeps it until `send` returns.
    """

    @property
    def number(self) -> int:
        """Number of the block."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the block."""
        ...

    def tensors(self) -> Sequence[torch.Tensor]:
        """The spans in order: one-dimensional, contiguous ``uint8`` tensors over the caller's memory.

        When receiving, they are on the channel's device. When sending, some or all may be in the CPU's memory although
        the channel's device is another one, because a server may keep copies there.
        """
        ...

    def buffers(self) -> Sequence[memoryview]:
        """The spans in order, as writable byte views.

        Raises:
            TransportUnavailable: The memory is not the CPU's.
        """
        ...

    def regions(self) -> Regions[int]:
        """The spans in order, by address and length, without empty ones. Cheaper than byte views when there are many.

        The array is valid as long as the block exists, and must not be changed.

        Raises:
            TransportUnavailable: The memory is not the CPU's.
        """
        return regions_of(self.buffers())

    def settle(self) -> None:
        """Complete a filled block: copy its bytes to their destination, if they were received elsewhere.

        The receiver of the block calls it once all bytes have arrived; the transport does not. It may wait for the
        device, so it must not be called in the event loop's thread.
        """
