"""What is done beside the event loop where it takes long: framing and looking up what has many pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import anyio

from netloader.codecs.frames import encode_frame
from netloader.core.messages import Announce
from netloader.core.plan import Plan

__all__ = ["FEW_SPANS", "FEW_TENSORS", "few_spans", "framed", "looked_up"]

R = TypeVar("R")

FEW_TENSORS = 2048
"""Tensors of a manifest that is dealt with in the event loop, larger ones beside it: as many take about 5 ms there."""

FEW_SPANS = 512
"""Pieces of memory that are looked up in the event loop, more of them beside it: as many take 0.3 to 2.6 ms there, and
a request for a model of large tensors has no more."""


async def framed(message: bytes | Announce) -> bytes:
    """A frame; one that is still to be made is made beside the event loop."""
    return message if isinstance(message, bytes) else await anyio.to_thread.run_sync(encode_frame, message)


def few_spans(plan: Plan, numbers: Iterable[int]) -> bool:
    """Whether blocks are made of so few pieces that looking them up need not be done beside the event loop."""
    return sum(len(plan.blocks[number].tensors) for number in numbers) <= FEW_SPANS


async def looked_up(look: Callable[[Plan, Sequence[int]], R], plan: Plan, numbers: Sequence[int]) -> R:
    """What `look` finds about blocks: at once where they have few pieces, else beside the event loop."""
    if few_spans(plan, numbers):
        return look(plan, numbers)
    return await anyio.to_thread.run_sync(look, plan, numbers)
