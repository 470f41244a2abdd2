"""Slow readers, silent clients and silent probers: none of them keeps a client from its turn."""

from __future__ import annotations

import contextlib
from typing import Any

import anyio
import pytest
import torch

from netloader.core import messages as m
from netloader.errors import RefusedError
from netloader.server import admission
from netloader.server import session as server_session
from netloader.server.budgets import Stage
from netloader.tensors import hold
from netloader.transports.tcp import TcpTransport
from tests.drivers import kit
from tests.strangers.kinds import KINDS, Kind, identify, probe, read_slowly, strangers

SOURCE = kit.weights()
HOLDING = kit.held(SOURCE)
LARGE = {"large": torch.arange(5 << 20, dtype=torch.int64)}
LARGE_HOLDING = hold(LARGE, kit.IDENTITY)
TCP = TcpTransport(lanes=1)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_ANSWER", 0.05)
    monkeypatch.setattr(admission, "_AHEAD", 0.1)


async def test_silent_clients_in_all_turns_and_in_the_queue_do_not_keep_a_client_out() -> None:
    hub, into = kit.Hub(), kit.blank(SOURCE)
    async with (
        kit.serving(hub.transport, HOLDING, max_clients=2, max_queue=16) as server,
        strangers([Kind(18, identify, secret=True)], "127.0.0.1", server.port),
    ):
        await kit.pull(into, [kit.at(server)], hub.transport)
        assert not server.ended or server.ended[0].session.error is None
    assert kit.contents(into) == kit.contents(SOURCE)


async def test_slow_readers_in_all_turns_do_not_keep_a_client_out_and_go_on() -> None:
    into = kit.blank(LARGE)
    async with (
        kit.serving(TCP, LARGE_HOLDING, max_clients=2) as server,
        strangers([Kind(2, read_slowly, secret=True)], "127.0.0.1", server.port),
    ):
        await kit.until(lambda: server._turns.channels == 2)
        await kit.pull(into, [kit.at(server)], TCP)
        await kit.until(lambda: server.ended)
        assert len(server.ended) == 1, "a slow client is not ended while there is a channel for others"
    assert kit.contents(into) == kit.contents(LARGE)


async def test_when_all_channels_stand_still_the_slowest_is_told_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_ARREARS", 0.2)
    monkeypatch.setattr(admission, "LEAST_RATE", 1 << 30)
    into = kit.blank(LARGE)
    async with (
        kit.serving(TCP, LARGE_HOLDING, max_clients=1, stop_within=0.1) as server,
        strangers([Kind(2, read_slowly, secret=True)], "127.0.0.1", server.port),
    ):
        await kit.pull(into, [kit.at(server)], TCP)
        assert kit.contents(into) == kit.contents(LARGE)
        await kit.until(lambda: any(session.session.error for session in server.ended))
        error = next(session.session.error for session in server.ended if session.session.error)
        assert isinstance(error, RefusedError)
        assert (error.code, error.retry_after) == ("busy", 1.0)
        assert "others wait, and this client took less than" in error.message


async def test_a_client_that_is_slow_to_answer_is_served_although_its_turn_passed_on() -> None:
    hub = kit.Hub()
    async with (
        kit.serving(hub.transport, HOLDING, max_clients=1) as server,
        kit.fake_client(server) as slow,
        kit.fake_client(server) as second,
    ):
        await slow.say(kit.hello(hub.transport), m.Identify(identity=kit.IDENTITY))
        await slow.hear_until(m.Announce)
        await second.say(kit.hello(hub.transport), m.Identify(identity=kit.IDENTITY))
        await second.hear_until(m.Announce)
        await second.say(kit.agree(HOLDING, hub.transport))
        await second.hear_until(m.ChannelOffer)
        await slow.say(kit.agree(HOLDING, hub.transport))
        await slow.hear_until(m.ChannelOffer)


async def test_a_client_without_a_channel_in_time_is_told_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_session, "_RETURN_WAIT", 0.1)
    hub = kit.Hub()
    async with kit.serving(hub.transport, HOLDING, max_clients=1) as server, contextlib.AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(kit.fake_client(server)) for _ in range(3)]
        for wire in wires:  # each is announced, because the one before it does not answer
            await wire.say(kit.hello(hub.transport), m.Identify(identity=kit.IDENTITY, follow=False))
            await wire.hear_until(m.Announce)
        for wire in wires[:2]:
            await wire.say(kit.agree(HOLDING, hub.transport))
            await wire.hear_until(m.ChannelOffer)
        await wires[2].say(kit.agree(HOLDING, hub.transport))
        refusal = await wires[2].hear_until(m.Refusal)
    assert (refusal.code, refusal.retry_after) == ("busy", 1.0)
    assert "others took this client's turn before it answered" in refusal.message


async def test_silent_probers_do_not_stop_probes_or_pulls() -> None:
    hub, into = kit.Hub(), kit.blank(SOURCE)
    async with (
        kit.serving(hub.transport, HOLDING, max_clients=1) as server,
        strangers([KINDS["136 silent probers"]], "127.0.0.1", server.port),
    ):
        assert server._connections.count(Stage.PROBE) == server._limits.probes
        async with kit.fake_client(server) as wire:
            await probe(wire)
            await wire.say(m.Verdict(outcome="probed"))
            await wire.closed()
        await kit.pull(into, [kit.at(server)], hub.transport)
    assert kit.contents(into) == kit.contents(SOURCE)


async def test_a_relay_that_takes_no_blocks_is_not_named() -> None:
    hub, into = kit.Hub(), kit.blank(SOURCE)
    async with kit.serving(hub.transport, HOLDING, fan_out=1) as server, kit.fake_client(server) as silent:
        await silent.say(kit.hello(hub.transport), m.Identify(identity=kit.IDENTITY, relay=9, node="ab" * 8))
        await silent.hear_until(m.Announce)
        (session,) = server._sessions
        await kit.until(lambda: not session._moves(session))
        report = await kit.pull(into, [kit.at(server)], hub.transport)
    assert not report.attempts
    assert kit.contents(into) == kit.contents(SOURCE)


async def test_clients_that_use_their_turns_lose_none_to_others() -> None:
    """In a server whose clients all take their blocks, at most as many as have turns are served at once."""
    hub = kit.Hub()
    async with kit.serving(hub.transport, HOLDING, max_clients=2) as server, anyio.create_task_group() as tasks:
        blanks: list[Any] = [kit.blank(SOURCE) for _ in range(8)]
        for into in blanks:
            tasks.start_soon(kit.pull, into, [kit.at(server)], hub.transport)
        with contextlib.suppress(StopIteration):
            await kit.until(lambda: len(server.ended) == 8)
    assert all(kit.contents(into) == kit.contents(SOURCE) for into in blanks)
    assert all(session.session.error is None for session in server.ended)
