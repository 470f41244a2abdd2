"""The contract of a holding: its announcement, and access to the memory of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from netloader.codecs.block_view import BlockView
from netloader.core.plan import Plan
from netloader.core.protocol.events import Announcement

__all__ = ["Holding", "Memory"]


class Memory(Protocol):
    """The memory of a holding's blocks."""

    @property
    def call_bytes(self) -> int | None:
        """The size from which on no further block is added to a call of a channel; None: the channel's own.

        For views that own memory until the call returns.
        """
        ...

    def views(self, plan: Plan, numbers: Sequence[int]) -> Sequence[BlockView]:
        """Views of these blocks, in this order.

        Raises:
            ManifestError: Some of the memory is gone.
        """
        ...

    def missing(self, plan: Plan, numbers: Sequence[int]) -> dict[int, str]:
        """The blocks among `numbers` that cannot be served any more, each with the reason."""
        ...


class Holding(Protocol):
    """One set of tensors that can be served."""

    @property
    def announcement(self) -> Announcement:
        """The announcement that clients receive."""
        ...

    @property
    def device(self) -> str:
        """Device of the tensors, as torch names it."""
        ...

    @property
    def memory(self) -> Memory:
        """The memory of its blocks."""
        ...
