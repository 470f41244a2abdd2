"""A block's bytes as they lie in memory: what most transports put on the wire, without a copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from netloader.codecs.block_view import BlockView

__all__ = ["grouped_buffers", "spans"]


def spans(views: Iterable[BlockView]) -> Iterator[torch.Tensor]:
    """The spans of all blocks, in the order in which their bytes travel: one-dimensional ``uint8`` tensors."""
    for view in views:
        yield from view.tensors()


def grouped_buffers(views: Iterable[BlockView], most: int, nbytes: int) -> Iterator[list[memoryview]]:
    """The spans of all blocks as byte views, grouped for scatter-gather system calls.

    Args:
        views: Blocks on the CPU, in order.
        most: Byte views in one group at most (``IOV_MAX``).
        nbytes: Bytes after which a group ends; it may pass this by less than its last span.

    Yields:
        Groups whose concatenation is the concatenation of all blocks.
    """
    group: list[memoryview] = []
    size = 0
    for view in views:
        for buffer in view.buffers():
            group.append(buffer)
            size += len(buffer)
            if len(group) == most or size >= nbytes:
                yield group
                group, size = [], 0
    if group:
        yield group
