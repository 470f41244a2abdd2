"""Runs encoding and block lookups in a thread when they would block the event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import anyio

from netloader.codecs.frames import encode_frame
from netloader.core.manifest import DIGEST_BYTES, Manifest
from netloader.core.messages import Announce
from netloader.core.plan import Plan

__all__ = ["FEW_SPANS", "FEW_TENSORS", "encoded", "examined_quickly", "few_spans", "look_up"]

R = TypeVar("R")

_FEW_BLOCKS = 4096
"""Most blocks that are planned on the event loop."""

_FEW_SIZES = 8
"""Most sizes and strides for each of :data:`FEW_TENSORS` tensors that are examined on the event loop."""

FEW_TENSORS = 2048
"""Most tensors of a manifest that is processed on the event loop; a larger one is processed in a thread. This many
tensors take about 5 ms."""

FEW_SPANS = 512
"""Most spans that are looked up on the event loop; more are looked up in a thread. This many take 0.3 to 2.6 ms. A
request for a model of large tensors has fewer."""


async def encoded(message: bytes | Announce) -> bytes:
    """The message as a frame. A message that is not encoded yet is encoded in a thread."""
    return message if isinstance(message, bytes) else await anyio.to_thread.run_sync(encode_frame, message)


def examined_quickly(announce: Announce, ours: Manifest | None) -> bool:
    """Whether an announcement can be examined on the event loop, whatever its server wrote into it."""
    tensors = (announce.manifest or ours or Manifest(())).tensors
    if len(tensors) > FEW_TENSORS or len(announce.digests) > _FEW_BLOCKS * DIGEST_BYTES:
        return False
    return sum(len(spec.shape) + len(spec.stride) for spec in tensors) <= _FEW_SIZES * FEW_TENSORS


def few_spans(plan: Plan, numbers: Iterable[int]) -> bool:
    """Whether blocks have so few spans that they can be looked up on the event loop."""
    return sum(len(plan.blocks[number].tensors) for number in numbers) <= FEW_SPANS


async def look_up(lookup: Callable[[Plan, Sequence[int]], R], plan: Plan, numbers: Sequence[int]) -> R:
    """Call `lookup` for blocks: on the event loop if they have few spans, otherwise in a thread."""
    if few_spans(plan, numbers):
        return lookup(plan, numbers)
    return await anyio.to_thread.run_sync(lookup, plan, numbers)
