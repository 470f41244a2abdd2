"""What takes long with many tensors is not done on the event loop, where others are served meanwhile."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator

import anyio
import pytest
import torch

import netloader
from netloader.core.identity import ModelIdentity

TENSORS = 200_000
TOKEN = b"a token, so that long frames are authenticated too"
LONGEST = 0.05
"""Seconds of processor time that one callback may take; how long it waits for the interpreter is up to the machine."""


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[float, str]]]:
    """The longest callback of the event loop, and what it was; what the collector of garbage takes is left out."""
    found = [(0.0, "")]
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        found.append((time.thread_time() - began, repr(handle)))
        found[:] = [max(found)]

    monkeypatch.setattr(asyncio.Handle, "_run", timed)
    gc.disable()
    yield found
    gc.enable()


def small_tensors(value: float, count: int = TENSORS) -> dict[str, torch.Tensor]:
    rows = torch.full((count, 2), value)
    return {f"layers.{number}.weight": row for number, row in enumerate(rows.unbind())}


def test_a_pull_of_many_tensors_never_holds_up_the_loop(longest: list[tuple[float, str]]) -> None:
    """Server, pull and relay share one loop, as in a worker; then a pull without a manifest of its own."""
    identity, source, into = ModelIdentity(model="many"), small_tensors(1.0), small_tensors(0.0)

    async def story() -> object:
        async with (
            netloader.Server(host="127.0.0.1", token=TOKEN) as server,
            netloader.Server(host="127.0.0.1", token=TOKEN) as relay,
        ):
            await server.hold(small_tensors(1.0, 2), ModelIdentity(model="few", role="draft"))
            await netloader.pull_new(sources=[server.address], role="draft", token=TOKEN)  # late imports
            longest[:] = [(0.0, "")]
            await server.hold(source, identity)
            sources = [server.address]
            report = await netloader.pull(into, identity, sources=sources, relay=relay, token=TOKEN)
            assert report.tensors == TENSORS
            made, _ = await netloader.pull_new(sources=sources, layouts=("raw",), token=TOKEN)
            assert len(made) == TENSORS
            assert all(float(tensors[f"layers.{TENSORS - 1}.weight"][1]) == 1.0 for tensors in (into, made))
            return made

    made = anyio.run(story)  # freed outside of the loop: to drop so many tensors takes its owner a while
    assert made
    assert longest[0][0] <= LONGEST, longest[0][1]
