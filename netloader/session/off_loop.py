"""Runs work in a thread that would block the event loop, and names what is too much for the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import anyio

from netloader.core.manifest import DIGEST_BYTES, Manifest
from netloader.core.messages import Announce
from netloader.core.plan import Plan

__all__ = [
    "FEW_SPANS",
    "FEW_TENSORS",
    "examined_quickly",
    "few_spans",
    "from_thread",
    "in_thread",
    "look_up",
    "shielded",
    "weaken",
]

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


def examined_quickly(announce: Announce, ours: Manifest | None) -> bool:
    """Whether an announcement can be examined on the event loop, whatever its server wrote into it."""
    tensors = (announce.manifest or ours or Manifest(())).tensors
    if len(tensors) > FEW_TENSORS or len(announce.digests) > _FEW_BLOCKS * DIGEST_BYTES:
        return False
    return sum(len(spec.shape) + len(spec.stride) for spec in tensors) <= _FEW_SIZES * FEW_TENSORS


def few_spans(plan: Plan, numbers: Iterable[int]) -> bool:
    """Whether blocks have so few spans that they can be looked up on the event loop."""
    return sum(len(plan.blocks[number].tensors) for number in numbers) <= FEW_SPANS


def from_thread(function: Callable[[str], object]) -> Callable[[str], None]:
    """`function` for callers in other threads: it is called later, in the event loop that runs now."""
    loop = asyncio.get_running_loop()

    def call(text: str) -> None:
        loop.call_soon_threadsafe(function, text)

    return call


async def look_up(lookup: Callable[[Plan, Sequence[int]], R], plan: Plan, numbers: Sequence[int]) -> R:
    """Call `lookup` for blocks: on the event loop if they have few spans, otherwise in a thread."""
    if few_spans(plan, numbers):
        return lookup(plan, numbers)
    return await anyio.to_thread.run_sync(lookup, plan, numbers)


async def in_thread(call: Callable[[], R]) -> R:
    """Call a function in a worker thread.

    When this returns or raises, nothing of the thread keeps the tensors that the function was given:

    - Its error is raised without a reference cycle, which anyio's own frames would form. The frames in its traceback
      would keep them until the next garbage collection.
    - The thread drops the function before it reports. anyio's thread has its last call a moment longer.
    """
    calls = [call]
    del call
    results: list[R] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(calls.pop()())
        except Exception as error:  # noqa: BLE001 - raised below
            errors.append(error)

    await anyio.to_thread.run_sync(run)
    if errors:
        raise errors.pop()
    return results.pop()


async def weaken(let_go: Callable[[], None], manifest: Manifest | None) -> None:
    """Call `let_go`, which replaces references to tensors by weak ones: in a thread if there are many tensors."""
    if manifest is None or len(manifest.tensors) <= FEW_TENSORS:
        let_go()
        return
    await shielded(let_go)


async def shielded(call: Callable[[], None]) -> None:
    """Call a function in a worker thread, and wait for its end also when this is cancelled. Its time is bounded."""
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(call)
