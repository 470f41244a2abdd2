"""A channel that does not close in time keeps no turn: it is reported, and the next client is served at once."""

from __future__ import annotations

import logging
from typing import Any

import anyio
import pytest

from netloader.session import closing
from netloader.transports.faults import Faults, FaultyTransport
from tests.drivers import kit

SOURCE = kit.weights()
HOLDING = kit.held(SOURCE)


class _NeverCloses(FaultyTransport):
    """A transport whose first channel of the server does not close."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner, Faults())
        self.closing = anyio.Event()
        self.go = anyio.Event()

    async def offer(self, setup: Any) -> Any:
        pending = await super().offer(setup)
        take = pending.accept

        async def accept() -> Any:
            channel = await take()
            close = channel.aclose
            if not self.closing.is_set():

                async def aclose() -> None:
                    self.closing.set()
                    await self.go.wait()
                    await close()

                channel.aclose = aclose  # type: ignore[method-assign]
            return channel

        pending.accept = accept  # type: ignore[method-assign]
        return pending


async def test_a_turn_is_free_although_the_channel_of_its_session_does_not_close() -> None:
    hub, into = kit.Hub(), kit.blank(SOURCE)
    never = _NeverCloses(hub.transport)
    async with kit.serving(never, HOLDING, max_clients=1) as server, anyio.create_task_group() as tasks:
        tasks.start_soon(kit.pull, kit.blank(SOURCE), [kit.at(server)], hub.transport)
        with anyio.fail_after(kit.PATIENCE):
            await never.closing.wait()
        assert server._turns.taken == 0
        assert len(server.sessions) == 1, "it is still closing"
        await kit.pull(into, [kit.at(server)], hub.transport)
        never.go.set()
    assert kit.contents(into) == kit.contents(SOURCE)


async def test_a_channel_that_does_not_close_is_named_with_its_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(closing, "_CLOSING", 0.1)
    caplog.set_level(logging.ERROR, "netloader")
    hub, into = kit.Hub(), kit.blank(SOURCE)
    never = _NeverCloses(hub.transport)
    async with kit.serving(never, HOLDING, max_clients=1, stop_within=0.1) as server:
        await kit.pull(into, [kit.at(server)], hub.transport)
        await kit.until(lambda: not server.sessions)
        await server.retract(reason="its owner changes it", within=0.1)
    assert "memory channel: an operation may still read the memory being sent" in caplog.text
    assert "the memory of the target is not free to change: memory channel" in caplog.text
