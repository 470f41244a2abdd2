"""What can be served: a set of tensors with what is said about it, and the memory where its blocks live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from netloader.codecs.block_view import BlockView
from netloader.core.plan import Plan
from netloader.core.protocol.events import Announcement

__all__ = ["Holding", "Memory"]


class Memory(Protocol):
    """Where a holding's blocks live."""

    def views(self, plan: Plan, numbers: Sequence[int]) -> Sequence[BlockView]:
        """Views of these blocks, in this order.

        Raises:
            ManifestError: Some of the memory is gone.
        """
        ...

    def missing(self, plan: Plan, numbers: Sequence[int]) -> dict[int, str]:
        """Those of these blocks that can't be served any more, with the reason."""
        ...


class Holding(Protocol):
    """One set of tensors that can be served."""

    @property
    def announcement(self) -> Announcement:
        """What is said about it to clients."""
        ...

    @property
    def device(self) -> str:
        """Where it lives, as torch names it."""
        ...

    @property
    def memory(self) -> Memory:
        """Its blocks."""
        ...
