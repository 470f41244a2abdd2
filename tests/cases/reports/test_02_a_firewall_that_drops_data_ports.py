"""A firewall that drops packets to the data ports costs seconds, is named, and the next transport is tried."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import msgspec
import pytest

from netloader.client.pull import pull_from
from netloader.core.options import PullOptions, ServeOptions
from netloader.discovery.fixed import FixedSources
from netloader.errors import NoSourceLeft, TransportUnavailable
from netloader.tensors import destination, digest_of
from netloader.transports.base import Channel, Pending, Setup, Transport
from netloader.transports.tcp import transport as tcp
from tests.drivers import kit

SOURCE = kit.weights()
HOLDING = kit.held(SOURCE)


@contextlib.contextmanager
def unanswered_port() -> Iterator[int]:
    """A port that drops every SYN, as a firewall does: its backlog is full and nobody accepts."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


class _Elsewhere:
    """A pending tcp channel whose offer names another port."""

    def __init__(self, pending: Pending, port: int) -> None:
        self._pending = pending
        offer = msgspec.msgpack.decode(pending.offer, type=tcp._TcpOffer)
        self.offer = msgspec.msgpack.encode(msgspec.structs.replace(offer, port=port))

    async def accept(self) -> Channel:
        return await self._pending.accept()

    async def aclose(self) -> None:
        await self._pending.aclose()


class _Firewalled(tcp.TcpTransport):
    """tcp whose data ports can't be reached."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port

    async def offer(self, setup: Setup) -> Pending:
        return _Elsewhere(await super().offer(setup), self._port)


async def _pull(into: kit.Tensors, server: kit.WatchedServer, *transports: Transport) -> str:
    """Pull, and return the name of the transport that was used."""
    sources = FixedSources([kit.at(server)])
    options = PullOptions(timings=kit.CALM, timeout=kit.PATIENCE)
    report = await pull_from(destination(into), kit.IDENTITY, sources, transports, digest_of, options)
    return report.sources[str(kit.at(server))].transport


async def test_a_dropped_data_port_is_noticed_in_seconds_named_with_the_hint_and_the_next_transport_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert tcp._CONNECT_SECONDS <= 5.0
    monkeypatch.setattr(tcp, "_CONNECT_SECONDS", 0.2)
    hub, into = kit.Hub(), kit.blank(SOURCE)
    with unanswered_port() as port:
        options = ServeOptions(host="127.0.0.1", timings=kit.CALM)
        async with kit.WatchedServer([_Firewalled(port), hub.transport], options) as server:
            server.add(HOLDING)
            assert await _pull(into, server, tcp.TcpTransport(), hub.transport) == "memory"
            assert kit.contents(into) == kit.contents(SOURCE)
            with pytest.raises(NoSourceLeft, match=r"did not answer within 0\.2 s") as caught:
                await _pull(into, server, tcp.TcpTransport())
            await kit.until(lambda: len(server.ended) == 3, "the server waits no longer than the client")
    (attempt,) = caught.value.attempts
    assert isinstance(attempt.cause, TransportUnavailable)
    assert "a firewall between both hosts" in attempt.hint
    assert "not by tcp" in caplog.text
    assert "a firewall between both hosts" in caplog.text
