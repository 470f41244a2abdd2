"""One block as it lies in memory: what transports move, and what is hashed, packed and staged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from netloader.codecs.regions import Regions, regions_of

if TYPE_CHECKING:
    import torch

__all__ = ["BlockView"]


class BlockView(Protocol):
    """One block's bytes, where they live: memory of the caller's own tensors, not a copy."""

    @property
    def number(self) -> int:
        """Number of the block."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        ...

    def tensors(self) -> Sequence[torch.Tensor]:
        """The spans in order: one-dimensional, contiguous ``uint8`` tensors over the caller's memory, where that is.

        What is received goes to the channel's device. What is sent may lie in the CPU's memory, in part or as a whole,
        while the channel's device is another one: a server keeps copies there.
        """
        ...

    def buffers(self) -> Sequence[memoryview]:
        """The spans in order, as writable byte views.

        Raises:
            TransportUnavailable: The memory is not the CPU's.
        """
        ...

    def regions(self) -> Regions[int]:
        """The spans in order, by address and length, without empty ones; where there are many, cheaper than byte views.

        Valid as long as the block is there; not to be changed.

        Raises:
            TransportUnavailable: The memory is not the CPU's.
        """
        return regions_of(self.buffers())

    def settle(self) -> None:
        """The block was filled: bring its bytes to where they belong, if that is not where they are.

        Called once all bytes are in place, by the receiver of the block and not by its transport. May wait for the
        device: not for the event loop's thread.
        """
