"""Two concurrent calls of one channel that fail together: which error a pull reports."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest

from netloader.client import session as client_session
from netloader.errors import DigestMismatch, NoSourceLeft, PeerLost
from netloader.transports.base import BlockView, Channel, Landed, Setup
from netloader.transports.faults import Faults, FaultyTransport
from tests.drivers import kit

SOURCE = kit.weights()


class _Crossed:
    """A channel with two concurrent calls: the second delivers wrong bytes, the first then finds it closed."""

    depth = 2
    whole_blocks = False

    def __init__(self, inner: Channel) -> None:
        self._inner = inner
        self._calls = 0
        self._cut = anyio.Event()

    async def send(self, blocks: Sequence[BlockView]) -> None:
        await self._inner.send(blocks)

    async def recv(self, blocks: Sequence[BlockView], landed: Landed | None = None) -> None:
        self._calls += 1
        if self._calls == 1:
            await self._cut.wait()
            raise PeerLost("the line to the peer broke")
        assert landed is not None
        try:
            for block in blocks:
                landed(block)
        finally:
            self._cut.set()

    async def aclose(self) -> None:
        await self._inner.aclose()


class _CrossedTransport(FaultyTransport):
    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        return _Crossed(await super().connect(offer, setup))


async def test_a_digest_mismatch_in_one_call_outranks_the_broken_channel_seen_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_session, "_RECEIVE_BYTES", 1)  # one call for each block
    hub = kit.Hub()
    async with kit.serving(hub.transport, kit.held(SOURCE)) as server:
        with pytest.raises(NoSourceLeft) as caught:
            await kit.pull(kit.blank(SOURCE), [kit.at(server)], _CrossedTransport(hub.transport, Faults()))
    (attempt,) = caught.value.attempts
    assert isinstance(attempt.cause, DigestMismatch)
    assert attempt.cause.block == 1
