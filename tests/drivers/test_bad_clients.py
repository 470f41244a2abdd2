"""Clients that violate the protocol: each ends its own session only, and a concurrent pull is not affected."""

from __future__ import annotations

import contextlib
import gc
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import netloader.server.server
from netloader.codecs.frames import encode_frame
from netloader.core import messages as m
from netloader.core.keys import MAC_BYTES, FrameSeal
from netloader.core.options import Timings
from netloader.core.protocol import State
from netloader.errors import (
    NetloaderError,
    PeerLost,
    RefusedError,
    RemoteProtocolError,
    TransferTimeout,
    TransportError,
)
from netloader.server import session as server_session
from netloader.server.budgets import Stage
from netloader.transports.base import Channel
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport
from tests.drivers import kit

SOURCE = kit.weights()
HOLDING = kit.held(SOURCE)
BLOCKS = len(HOLDING.announcement.plan.blocks)
STEPS = (
    "connected",
    "hello",
    "welcome",
    "identify",
    "announce",
    "agree",
    "offer",
    "channel",
    "want",
    "grant",
    "verdict",
)

Wire = kit.Wire[m.ServerMessage]
Script = Callable[["ScriptedClient"], Awaitable[None]]


class ScriptedClient:
    """A client that follows the protocol up to a step; the test decides what it does next."""

    def __init__(self, wire: Wire, hub: kit.Hub, token: bytes | None = None) -> None:
        self.wire = wire
        self.hub = hub
        self.channel: Channel | None = None
        self._token = token
        self._offer = b""

    async def follow(self, last: str) -> None:
        """Take part up to and including step `last`."""
        for step in STEPS[: STEPS.index(last) + 1]:
            await self._step(step)

    async def _step(self, step: str) -> None:
        wire, transport = self.wire, self.hub.transport
        match step:
            case "hello":
                await wire.say(kit.hello(transport, self._token))
            case "welcome":
                heard = await wire.hear_until(m.Welcome)
                if self._token is not None:
                    wire.authenticate(self._token, heard)
            case "identify":
                await wire.say(m.Identify(identity=kit.IDENTITY))
            case "announce":
                await wire.hear_until(m.Announce)
            case "agree":
                await wire.say(kit.agree(HOLDING, transport))
            case "offer":
                self._offer = (await wire.hear_until(m.ChannelOffer)).offer
            case "channel":
                self.channel = await transport.connect(self._offer, kit.setup())
            case "want":
                await wire.say(m.Want(ranges=((0, 2),)))
            case "grant":
                await wire.hear_until(m.Grant)
            case "verdict":
                await wire.say(m.Verdict(outcome="partial"))


async def during_a_pull(
    script: Script, timings: Timings = kit.CALM, *, says_nothing: bool = False, **options: Any
) -> NetloaderError | None:
    """Run `script` while a pull is held in the middle; return the error of the script's session.

    A connection that `says_nothing` has no session, and therefore no error.
    """
    faults = Faults([Fault(FaultKind.HOLD, 3)])
    hub = kit.Hub()
    into = kit.blank(SOURCE)
    token = options.get("token")
    async with kit.serving(FaultyTransport(hub.transport, faults), HOLDING, timings=timings, **options) as server:
        async with anyio.create_task_group() as tasks:

            async def good() -> None:
                await kit.pull(into, [kit.at(server)], hub.transport, token=token)

            tasks.start_soon(good)
            await kit.until(lambda: faults.fired)
            async with kit.fake_client(server) as wire:
                client = ScriptedClient(wire, hub, token)
                try:
                    with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                        await script(client)
                    await anyio.aclose_forcefully(wire.stream)
                    await kit.until(lambda: says_nothing or server.ended, "the session ended")
                    await kit.until(lambda: len(server.sessions) == 1, "the connection ended")
                finally:
                    if client.channel is not None:
                        await client.channel.aclose()
            assert [s.state for s in server.sessions] == [State.TRANSFER]
            faults.release()
        await kit.until(lambda: server.sessions == ())
        assert kit.contents(into) == kit.contents(SOURCE)
        *bad, good_one = [ended.session.error for ended in server.ended]
        assert good_one is None
        assert len(bad) == (0 if says_nothing else 1)
        error = bad[0] if bad else None
        if error is not None:
            assert error.hint
            assert error.story or isinstance(error, PeerLost)
        # The next client is served as usual.
        again = kit.blank(SOURCE)
        await kit.pull(again, [kit.at(server)], hub.transport, token=token)
        assert kit.contents(again) == kit.contents(SOURCE)
    return error


# --- at every step ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_leaked_descriptors")
@pytest.mark.parametrize("how", ["silence", "close", "reset", "half a frame", "garbage", "huge", "goodbye"])
async def test_a_client_that_violates_the_protocol_at_any_step_ends_its_own_session_only(how: str) -> None:
    for step in STEPS if how in ("close", "garbage") else STEPS[::2]:
        await violate_the_protocol(how, step)


async def violate_the_protocol(how: str, step: str) -> None:
    async def script(client: ScriptedClient) -> None:
        await client.follow(step)
        wire = client.wire
        match how:
            case "silence":
                await wire.closed()
            case "close":
                await wire.stream.aclose()
            case "reset":
                await wire.reset()
            case "half a frame":
                await wire.raw(b"\x00\x00\x00\x40half")
                await wire.closed()
            case "garbage":
                await wire.raw(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
                await wire.closed()
            case "huge":
                await wire.raw(b"\x7f\xff\xff\xff" + bytes(200_000))
                await wire.closed()
            case "goodbye":
                await wire.say(m.Goodbye(code="done", reason="never mind"))
                await wire.closed()

    waits = how in ("silence", "half a frame")
    says_nothing = step == "connected" and how in ("silence", "close", "reset")
    error = await during_a_pull(script, kit.QUICK if waits else kit.CALM, says_nothing=says_nothing)
    if says_nothing or step == "verdict":  # there is no session, or it is complete by then
        return
    assert error is not None, step
    expected: tuple[type[NetloaderError], ...]
    match how:
        case "silence" | "half a frame":
            expected = (TransferTimeout,)
        case "close" | "reset":
            expected = (PeerLost,)
        case "goodbye":
            expected = (RefusedError,)
        case _:
            expected = (RemoteProtocolError,)
    assert isinstance(error, expected), (step, error)


async def test_a_client_that_sends_one_byte_at_a_time_has_the_same_deadline() -> None:
    frame = encode_frame(m.Hello(protocol=1, nonce=kit.NONCE, software="x" * 500))

    async def script(client: ScriptedClient) -> None:
        for byte in frame:
            await client.wire.raw(bytes([byte]))
            with anyio.move_on_after(0.01):
                await client.wire.closed()
                return

    assert isinstance(await during_a_pull(script, kit.QUICK), TransferTimeout)


# --- single violations ------------------------------------------------------------------------------------------------


def sends(step: str, *messages: m.ClientMessage) -> Script:
    async def script(client: ScriptedClient) -> None:
        await client.follow(step)
        await client.wire.say(*messages)
        await client.wire.closed()

    return script


def want(*ranges: tuple[int, int]) -> m.Want:
    return m.Want(ranges=ranges)


HELLO = m.Hello(protocol=1, nonce=kit.NONCE)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (sends("connected", want((0, 1))), "Want is not legal in LISTEN"),
        (sends("connected", m.Verdict(outcome="complete")), "Verdict is not legal in LISTEN"),
        (sends("connected", HELLO, HELLO), "Hello is not legal in VALIDATE"),
        (sends("connected", *[HELLO] * 1000), "Hello is not legal in VALIDATE"),
        (sends("hello", want((0, 1))), "Want is not legal in VALIDATE"),
        (sends("hello", m.Verdict(outcome="complete")), "Verdict is not legal in VALIDATE"),
        (sends("announce", want((0, 1))), "before it agreed"),
        (sends("announce", m.Signal(data=b"x")), "before a transport was chosen"),
        (sends("announce", m.Agree(plan="0" * 64, transport="memory")), "derived different blocks"),
        (sends("announce", m.Agree(plan=HOLDING.announcement.plan.digest, transport="carrier pigeon")), "pigeon"),
        (sends("offer", m.Agree(plan=HOLDING.announcement.plan.digest, transport="memory")), "sent Agree twice"),
        (sends("agree", *[m.Signal(data=b"x")] * 1000), "signals"),
        (sends("agree", *[m.Signal(data=bytes(65536))] * 20), "signals"),
        (sends("grant", *[m.Signal(data=bytes(65536))] * 20), "signals"),
        (sends("channel", want((0, BLOCKS + 1))), "there are"),
        (sends("channel", want((5, 5))), "there are"),
        (sends("channel", want((3, 5), (4, 6))), "there are"),
        (sends("channel", want()), "names no block"),
        (sends("channel", want((3, 5)), want((4, 6))), "already waiting"),
        (sends("offer", want((3, 5)), want((4, 6))), "already waiting"),
        (sends("channel", *[want((0, 1))] * 5000), "already waiting"),
        (sends("hello", m.Identify(identity=kit.variant(model="another"))), "model is 'kit' at the server"),
        (sends("hello", m.Identify(role="draft", layouts=("raw",))), "nothing is held for draft"),
        (sends("hello", m.Identify(identity=kit.IDENTITY, root="0" * 64)), "pinned to root 0000"),
        (sends("announce", m.Identify(identity=kit.IDENTITY)), "Identify is not legal in PLAN"),
    ],
)
async def test_an_illegal_or_invalid_message_ends_the_session_with_the_reason(script: Script, reason: str) -> None:
    error = await during_a_pull(script)
    assert isinstance(error, RemoteProtocolError | RefusedError)
    assert reason in error.message


async def test_a_refused_client_that_keeps_sending_still_receives_the_reason() -> None:
    hub = kit.Hub()
    heard: list[m.ServerMessage] = []
    async with kit.serving(hub.transport, HOLDING) as server, kit.fake_client(server) as wire:
        await wire.say(HELLO, m.Identify(identity=kit.variant(model="another")))
        await wire.say(*[HELLO] * 2000)
        heard = await wire.hear_all()
    refusal = heard[-1]
    assert isinstance(refusal, m.Refusal)
    assert refusal.code == "identity"
    assert "set MODEL" in refusal.hint


async def test_a_client_that_never_connects_the_channel_times_out() -> None:
    async def script(client: ScriptedClient) -> None:
        await client.follow("offer")
        await client.wire.closed()

    assert isinstance(await during_a_pull(script, kit.QUICK), TransferTimeout)


async def test_a_client_that_requests_blocks_and_never_reads_its_channel_times_out() -> None:
    async def script(client: ScriptedClient) -> None:
        client.hub = hub
        await client.follow("channel")
        await client.wire.say(want((0, BLOCKS)))
        await client.wire.closed()

    hub = kit.Hub(1000)
    error: NetloaderError | None = None
    async with kit.serving(hub.transport, HOLDING, timings=kit.QUICK) as server, kit.fake_client(server) as wire:
        client = ScriptedClient(wire, hub)
        await script(client)
        await kit.until(lambda: server.ended)
        error = server.ended[0].session.error
        assert client.channel is not None
        await client.channel.aclose()
    assert isinstance(error, TransferTimeout)
    assert "takes no bytes" in error.message


async def test_a_client_that_never_reads_its_control_connection_times_out() -> None:
    many = {f"a.tensor.with.quite.a.long.name.{i}": torch.zeros(1) for i in range(4000)}
    holding = kit.held(many)
    hub = kit.Hub()
    async with kit.serving(hub.transport, holding, timings=kit.QUICK, max_clients=1) as server:
        assert server._listening is not None
        for listener in server._listening.sockets:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            raw.connect(("127.0.0.1", server.port))
        await anyio.wait_writable(raw)
        raw.send(encode_frame(HELLO) + encode_frame(m.Identify(identity=kit.IDENTITY)))
        await kit.until(lambda: server.ended)
        error = server.ended[0].session.error
        assert isinstance(error, TransferTimeout)
        raw.close()
        into = kit.blank(many)
        await kit.pull(into, [kit.at(server)], hub.transport)
        assert kit.contents(into) == kit.contents(many)


async def test_too_many_open_requests_end_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_session, "_OPEN_REQUESTS", 64)
    source = {"large": torch.zeros(100, kit.BLOCK, dtype=torch.uint8)}
    holding = kit.held(source)
    hub = kit.Hub(0)
    async with kit.serving(hub.transport, holding) as server, kit.fake_client(server) as wire:
        client = ScriptedClient(wire, hub)
        await client.follow("announce")
        await wire.say(kit.agree(holding, hub.transport))
        offer = (await wire.hear_until(m.ChannelOffer)).offer
        channel = await hub.transport.connect(offer, kit.setup())
        await wire.say(*(want((number, number + 1)) for number in range(100)))
        await wire.closed()
        await kit.until(lambda: server.ended)
        error = server.ended[0].session.error
        assert isinstance(error, RemoteProtocolError)
        assert "requests open" in error.message
        await channel.aclose()


# --- tokens -----------------------------------------------------------------------------------------------------------


TOKEN = b"open sesame"


IDENTIFY = encode_frame(m.Identify(identity=kit.IDENTITY))


def with_code(frame: bytes, code: bytes) -> bytes:
    """`frame` with these bytes where its authentication code belongs."""
    return (len(frame) - 4 + len(code)).to_bytes(4, "big") + frame[4:] + code


@pytest.mark.parametrize("code", [b"", bytes(MAC_BYTES), b"x" * 5, b"x" * MAC_BYTES])
async def test_a_client_whose_first_frame_is_not_authentic_is_told_nothing_about_the_model(code: bytes) -> None:
    heard: list[m.ServerMessage] = []

    async def script(client: ScriptedClient) -> None:
        await client.follow("welcome")
        await client.wire.raw(with_code(IDENTIFY, code))
        heard.extend(await client.wire.hear_all())

    error = await during_a_pull(script, token=TOKEN)
    assert isinstance(error, RefusedError)
    assert error.code == "auth"
    (refusal,) = heard
    assert isinstance(refusal, m.Refusal)
    assert "kit" not in refusal.message + refusal.hint


async def test_what_one_side_sent_can_neither_be_replayed_nor_reflected() -> None:
    await during_a_pull(sends("verdict"), token=TOKEN)  # the frames of `ScriptedClient` are authentic
    hub = kit.Hub()
    async with kit.serving(hub.transport, HOLDING, token=TOKEN) as server:
        async with kit.fake_client(server) as wire:
            await wire.say(kit.hello(hub.transport, TOKEN))
            welcome = await wire.hear_until(m.Welcome)
            keys = wire.authenticate(TOKEN, welcome)
        identified = with_code(IDENTIFY, FrameSeal(keys.client).close(IDENTIFY[4:]))

        async def session(frame: Callable[[m.Welcome], bytes]) -> None:
            async with kit.fake_client(server) as wire:
                await wire.say(kit.hello(hub.transport, TOKEN))
                welcome = await wire.hear_until(m.Welcome)
                await wire.raw(frame(welcome))
                with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError, RemoteProtocolError):
                    await wire.closed()

        await session(lambda _: identified)
        await session(lambda welcome: with_code(IDENTIFY, welcome.proof[:MAC_BYTES]))
        await kit.until(lambda: len(server.ended) == 3)
        for ended in server.ended[1:]:
            assert isinstance(ended.session.error, RefusedError)
            assert ended.session.error.code == "auth"


# --- connections that have not identified themselves, and stray ones --------------------------------------------------


@pytest.mark.parametrize("greets", [False, True])
async def test_silent_connections_are_limited_and_do_not_keep_a_client_out(*, greets: bool) -> None:
    hub, into = kit.Hub(), kit.blank(SOURCE)
    async with kit.serving(hub.transport, HOLDING, max_strangers=8) as server, contextlib.AsyncExitStack() as stack:
        silent = []
        for _ in range(30):
            wire = await stack.enter_async_context(kit.fake_client(server))
            if greets:
                await wire.say(kit.hello(hub.transport))
                await wire.hear_until(m.Welcome)
            silent.append(wire)
        await kit.until(lambda: server.gone == 22 and len(server.sessions) <= 8)
        assert len(server.sessions) == 8
        # The oldest is turned away, with a time at which the client comes again.
        for wire in silent[:22]:
            (refusal,) = await wire.hear_all()
            assert isinstance(refusal, m.Refusal)
            assert (refusal.code, refusal.retry_after) == ("busy", 1.0)
        # The newest is kept: it may just be slow.
        await kit.pull(into, [kit.at(server)], hub.transport)
        if not greets:
            await silent[-1].say(kit.hello(hub.transport))
        await silent[-1].say(m.Identify(identity=kit.IDENTITY))
        await silent[-1].hear_until(m.Announce)
        assert kit.contents(into) == kit.contents(SOURCE)


async def test_clients_that_have_a_turn_or_wait_for_one_are_not_evicted() -> None:
    hub = kit.Hub()
    faults = Faults([Fault(FaultKind.HOLD, 3, times=None)])
    blanks = [kit.blank(SOURCE) for _ in range(4)]
    async with (
        kit.serving(FaultyTransport(hub.transport, faults), HOLDING, max_strangers=1, max_clients=2) as server,
        anyio.create_task_group() as tasks,
        contextlib.AsyncExitStack() as stack,
    ):
        for count, into in enumerate(blanks):
            tasks.start_soon(kit.pull, into, [kit.at(server)], hub.transport)
            await kit.until(lambda: sum(bool(s.role) for s in server.sessions) == count + 1)  # noqa: B023
        for _ in range(10):
            await stack.enter_async_context(kit.fake_client(server))
        await kit.until(lambda: server.gone == 9)
        assert sum(bool(s.role) for s in server.sessions) == 4
        faults.release()
    assert all(kit.contents(into) == kit.contents(SOURCE) for into in blanks)


async def test_probes_cannot_keep_a_pull_from_its_turn() -> None:
    hub, into = kit.Hub(), kit.blank(SOURCE)
    probe = m.Identify(role="target", layouts=("raw",), probe=True)
    async with kit.serving(hub.transport, HOLDING, max_clients=1) as server, contextlib.AsyncExitStack() as stack:
        for _ in range(40):
            wire = await stack.enter_async_context(kit.fake_client(server))
            await wire.say(kit.hello(hub.transport), probe)
            await wire.hear_until(m.Announce)
        assert server._connections.count(Stage.PROBE) == 40
        assert server._turns.taken == 0
        await kit.pull(into, [kit.at(server)], hub.transport)
    assert kit.contents(into) == kit.contents(SOURCE)


async def test_repeated_stray_connections_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "netloader")
    hub = kit.Hub()
    async with kit.serving(hub.transport, HOLDING) as server:
        for _ in range(20):
            async with kit.fake_client(server) as wire:
                await wire.raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10)
                await wire.closed()
        await kit.until(lambda: len(server.ended) == 20)
    about = [r for r in caplog.records if "session" in r.getMessage()]
    assert len(about) == 1
    assert about[0].levelno == logging.INFO
    assert "no client's" in about[0].getMessage()


async def test_the_server_pauses_after_a_stray_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(netloader.server.server, "_STRAY_PAUSE", 60.0)
    hub, into = kit.Hub(), kit.blank(SOURCE)
    async with kit.serving(hub.transport, HOLDING) as server:
        for _ in range(3):  # clients that follow the protocol cause no pause
            await kit.pull(into, [kit.at(server)], hub.transport)
        async with kit.fake_client(server) as wire:
            await wire.raw(b"GET / HTTP/1.1\r\n\r\n")
            await wire.closed()
        await kit.until(lambda: server.ended[3:])
        with anyio.move_on_after(0.5) as scope:
            await kit.pull(into, [kit.at(server)], hub.transport)
        assert scope.cancelled_caught, "a new connection was accepted at once"
    assert kit.contents(into) == kit.contents(SOURCE)


async def test_the_number_of_logged_refusals_is_limited(caplog: pytest.LogCaptureFixture) -> None:
    hub = kit.Hub()
    async with kit.serving(hub.transport, HOLDING) as server:
        for _ in range(30):
            async with kit.fake_client(server) as wire:
                await wire.say(HELLO, m.Identify(identity=kit.variant(model="another")))
                await wire.closed()
        await kit.until(lambda: len(server.ended) == 30)
    assert sum("set MODEL" in r.getMessage() for r in caplog.records) == 20


async def test_text_from_a_peer_cannot_add_lines_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    hub = kit.Hub()
    evil = "bye\nCRITICAL root: all your base\x1b[2J" + "x" * 3000
    async with kit.serving(hub.transport, HOLDING) as server, kit.fake_client(server) as wire:
        await ScriptedClient(wire, hub).follow("announce")
        await wire.say(m.Goodbye(code="internal", reason=evil))
        await wire.closed()
        await kit.until(lambda: server.ended)
    (line,) = [r.getMessage() for r in caplog.records if "all your base" in r.getMessage()]
    assert "\n" not in line
    assert "\x1b" not in line
    assert len(line) < 1000


# --- bugs of this side ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["offer", "accept", "send"])
async def test_an_unexpected_error_in_a_transport_ends_one_session_only(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    hub = kit.Hub()

    class Broken(FaultyTransport):
        async def offer(self, setup: Any) -> Any:
            if where == "offer" and fail:
                raise ZeroDivisionError("ouch")
            pending = await super().offer(setup)
            take = pending.accept

            async def accept() -> Any:
                if where == "accept" and fail:
                    raise ZeroDivisionError("ouch")
                channel = await take()
                if where == "send" and fail:

                    async def send(blocks: Any) -> None:
                        raise ZeroDivisionError("ouch")

                    channel.send = send  # type: ignore[method-assign]
                return channel

            pending.accept = accept  # type: ignore[method-assign]
            return pending

    fail = True
    into = kit.blank(SOURCE)
    async with kit.serving(Broken(hub.transport, Faults()), HOLDING) as server:
        with pytest.raises(NetloaderError, match="unexpected ZeroDivisionError: ouch"):
            await kit.pull(into, [kit.at(server)], hub.transport)
        fail = False
        await kit.pull(into, [kit.at(server)], hub.transport)
    assert kit.contents(into) == kit.contents(SOURCE)
    assert "ZeroDivisionError" in caplog.text


async def test_an_ended_session_keeps_no_tensor_alive() -> None:
    hub = kit.Hub(1000)
    source = kit.weights()
    watch = StorageWeakRef(source["large"].untyped_storage())  # type: ignore[no-untyped-call]
    async with kit.serving(hub.transport, kit.held_weakly(source), timings=kit.QUICK) as server:
        gc.collect()
        gc.disable()
        try:
            async with kit.fake_client(server) as wire:
                client = ScriptedClient(wire, hub)
                await client.follow("channel")
                await wire.say(want((0, BLOCKS)))
                await wire.closed()
                await kit.until(lambda: server.ended)
                assert isinstance(server.ended[0].session.error, TransportError)
                assert client.channel is not None
                await client.channel.aclose()
            source.clear()
            await kit.until(watch.expired, "the memory is free")
        finally:
            gc.enable()
