"""A block's bytes in the order of memory, which most transports send without a copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from netloader.codecs.block_view import BlockView

__all__ = ["grouped_buffers", "spans"]


def spans(views: Iterable[BlockView]) -> Iterator[torch.Tensor]:
    """The spans of all blocks, in the order in which they are sent: one-dimensional ``uint8`` tensors."""
    for view in views:
        yield from view.tensors()


def grouped_buffers(views: Iterable[BlockView], most: int, nbytes: int) -> Iterator[list[memoryview]]:
    """The spans of all blocks as byte views, grouped for scatter-gather system calls.

    Args:
        views: Blocks on the CPU, in order.
        most: Most byte views in one group (``IOV_MAX``).
        nbytes: Size at which a group ends; its last span may exceed it.

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
