"""With a token, whoever sits between a client and a server can pass bytes on, cut and delay, and nothing else.

He is led to by a stale address, a squatted port or a forwarder that somebody took over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import anyio
import msgspec
import pytest

from netloader.codecs.frames import encode_frame
from netloader.core import messages as m
from netloader.core.addresses import Address
from netloader.core.protocol import State
from netloader.errors import NetloaderError, NoSourceLeft, PeerLost, RefusedError, RemoteProtocolError
from netloader.transports.io.listener import KEY_BYTES
from tests.cases.hostile.between import Direction, Tamper, between
from tests.drivers import kit

TOKEN = b"a token of both sides"
SOURCE = kit.weights()
HOLDING = kit.held(SOURCE)
FAKE_SOURCE = "127.0.0.1:9"
FORGED = m.Refusal(
    code="busy",
    message="forged text",
    hint="forged hint",
    retry_after=3600.0,
    sources=(FAKE_SOURCE,),
)


async def failed_pull(source: Address, hub: kit.Hub, **options: Any) -> NetloaderError:
    """The reason why a pull through somebody in the middle failed. Its tensors stay as they were."""
    into = kit.blank(SOURCE)
    before = kit.contents(into)
    with pytest.raises(NoSourceLeft) as caught:
        await kit.pull(into, [source], hub.transport, token=TOKEN, **options)
    assert kit.contents(into) == before
    (attempt,) = caught.value.attempts
    return attempt.cause


async def test_a_forwarder_that_passes_on_is_no_hindrance() -> None:
    into, carrier = kit.blank(SOURCE), kit.carrier("tcp")
    async with kit.serving(carrier, HOLDING, token=TOKEN) as server, between(kit.at(server)) as forwarder:
        await kit.pull(into, [forwarder.address], carrier, token=TOKEN)
    assert kit.contents(into) == kit.contents(SOURCE)
    assert forwarder.connections == 1


def flipped(frame: bytes, place: int) -> bytes:
    changed = bytearray(frame)
    changed[4 + place % (len(frame) - 4)] ^= 0x01
    return bytes(changed)


@pytest.mark.parametrize("place", [3, 40, -1])
@pytest.mark.parametrize(
    ("said_by", "number"),
    [("client", 0), ("client", 1), ("client", 2), ("server", 0), ("server", 1), ("server", 2), ("server", 3)],
)
async def test_a_changed_byte_of_any_control_frame_ends_the_session(
    said_by: Direction, number: int, place: int
) -> None:
    def change(who: Direction, which: int, frame: bytes) -> Sequence[bytes]:
        return [flipped(frame, place) if (who, which) == (said_by, number) else frame]

    hub = kit.Hub()
    async with kit.serving(hub.transport, HOLDING, token=TOKEN) as server, between(kit.at(server), change) as forwarder:
        await failed_pull(forwarder.address, hub)
        await kit.until(lambda: server.ended, "the server's session ended")
    assert server.ended[0].session.state is State.FAILED


def dropped(number: int) -> Tamper:
    return lambda who, which, frame: [] if (who, which) == ("server", number) else [frame]


def repeated(number: int) -> Tamper:
    return lambda who, which, frame: [frame, frame] if (who, which) == ("server", number) else [frame]


def swapped(number: int) -> Tamper:
    kept: list[bytes] = []

    def change(who: Direction, which: int, frame: bytes) -> Sequence[bytes]:
        if (who, which) == ("server", number):
            kept.append(frame)
            return []
        return [frame, *kept] if (who, which) == ("server", number + 1) else [frame]

    return change


def reflected(number: int) -> Tamper:
    """The client's own frames come back to it."""
    said: list[bytes] = []

    def change(who: Direction, which: int, frame: bytes) -> Sequence[bytes]:
        if who == "client":
            said.append(frame)
            return [frame]
        return [said[-1]] if which >= number else [frame]

    return change


@pytest.mark.parametrize("kind", [dropped, repeated, swapped, reflected])
async def test_frames_that_are_dropped_repeated_swapped_or_reflected_end_the_session(kind: object) -> None:
    assert callable(kind)
    hub = kit.Hub()
    async with (
        kit.serving(hub.transport, HOLDING, token=TOKEN) as server,
        between(kit.at(server), kind(1)) as forwarder,
    ):
        error = await failed_pull(forwarder.address, hub)
    assert isinstance(error, RemoteProtocolError)
    assert "is not authentic" in error.message
    assert "the peer does not know the token, or something between" in error.message


# --- what is not proven is neither obeyed nor shown -------------------------------------------------------------------


@pytest.mark.parametrize("said", [FORGED, m.Goodbye(code="gone", reason="forged text")], ids=["refusal", "goodbye"])
async def test_what_a_stranger_says_before_a_proof_is_neither_shown_nor_followed(
    said: m.ServerMessage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "netloader")
    hub = kit.Hub()

    async def script(wire: kit.Wire[m.ClientMessage]) -> None:
        await wire.hear_until(m.Hello)
        await wire.say(said)
        await wire.closed()

    async with kit.fake_server(script) as fake:
        error = await failed_pull(fake.address, hub)
    assert isinstance(error, PeerLost)
    assert error.message == "the peer ended the session before it proved that it knows the token"
    assert "forged" not in caplog.text + str(error)
    assert FAKE_SOURCE not in caplog.text


async def test_a_pull_that_waits_tries_again_and_soon_although_a_stranger_said_later() -> None:
    """Strangers answer for a while: the client comes back as if nobody had been there, until the right one answers."""
    strangers, into, hub = 2, kit.blank(SOURCE), kit.Hub()

    def change(who: Direction, number: int, frame: bytes) -> Sequence[bytes]:
        if forwarder.connections <= strangers and (who, number) == ("server", 0):
            return [encode_frame(FORGED)]
        return [frame]

    async with kit.serving(hub.transport, HOLDING, token=TOKEN) as server:
        async with between(kit.at(server), change) as forwarder:
            await kit.pull(into, [forwarder.address], hub.transport, token=TOKEN, wait=kit.PATIENCE)
        assert forwarder.connections == strangers + 1
    assert kit.contents(into) == kit.contents(SOURCE)


async def test_garbage_before_a_proof_is_not_quoted() -> None:
    hub = kit.Hub()

    async def script(wire: kit.Wire[m.ClientMessage]) -> None:
        await wire.hear_until(m.Hello)
        body = msgspec.msgpack.encode({"type": "forged text"})
        await wire.raw(len(body).to_bytes(4, "big") + body)
        await wire.closed()

    async with kit.fake_server(script) as fake:
        error = await failed_pull(fake.address, hub)
    assert isinstance(error, RemoteProtocolError)
    assert "did not prove that it knows the token" in error.message
    assert "forged" not in str(error)


async def test_a_refusal_of_a_server_that_proved_itself_is_shown_and_followed() -> None:
    hub, into = kit.Hub(), kit.blank(SOURCE)
    async with kit.serving(hub.transport, HOLDING, token=TOKEN) as server:

        async def script(wire: kit.Wire[m.ClientMessage]) -> None:
            await wire.hear_until(m.Hello)
            await wire.prove(TOKEN, kit.welcome(hub.transport))
            await wire.hear_until(m.Identify)
            await wire.say(m.Refusal(code="busy", message="others do", sources=(str(kit.at(server)),)))
            await wire.closed()

        async with kit.fake_server(script) as fake:
            await kit.pull(into, [fake.address], hub.transport, token=TOKEN)
    assert kit.contents(into) == kit.contents(SOURCE)


# --- the handshake is passed on to a real server ----------------------------------------------------------------------


async def test_who_passes_the_handshake_on_can_not_download() -> None:
    """After the client's Identify he speaks to the server himself: first as he is, then with the client's codes."""
    hub = kit.Hub()
    agree = encode_frame(kit.agree(HOLDING, hub.transport))

    def change(who: Direction, number: int, frame: bytes) -> Sequence[bytes]:
        if (who, number) == ("client", 2):
            return [agree]
        return [frame]

    async with kit.serving(hub.transport, HOLDING, token=TOKEN) as server, between(kit.at(server), change) as forwarder:
        await failed_pull(forwarder.address, hub)
        await kit.until(lambda: server.ended)
    (session,) = server.ended
    assert isinstance(session.session.error, RemoteProtocolError)
    assert session.session.transport == "", "no channel was offered to him"


async def test_who_passes_the_handshake_on_can_not_serve_his_own_weights() -> None:
    hub, others = kit.Hub(), kit.held(kit.weights(seed=1))

    def change(who: Direction, number: int, frame: bytes) -> Sequence[bytes]:
        if (who, number) == ("server", 1):
            return [encode_frame(m.Accepted(identity=kit.IDENTITY)), encode_frame(kit.announce(others))]
        return [frame]

    async with kit.serving(hub.transport, HOLDING, token=TOKEN) as server, between(kit.at(server), change) as forwarder:
        error = await failed_pull(forwarder.address, hub)
    assert isinstance(error, RemoteProtocolError)
    assert "is not authentic" in error.message


@pytest.mark.parametrize("field", ["nonce", "abilities", "software", "protocol", "oldest"])
async def test_a_changed_field_of_a_greeting_gives_other_keys(field: str) -> None:
    changes = {"nonce": b"x" * 16, "abilities": [], "software": "other", "protocol": 3, "oldest": 2}

    def change(who: Direction, number: int, frame: bytes) -> Sequence[bytes]:
        if (who, number) != ("client", 0):
            return [frame]
        body = msgspec.msgpack.encode({**msgspec.msgpack.decode(frame[4:]), field: changes[field]})
        return [len(body).to_bytes(4, "big") + body]

    hub = kit.Hub()
    async with kit.serving(hub.transport, HOLDING, token=TOKEN) as server, between(kit.at(server), change) as forwarder:
        error = await failed_pull(forwarder.address, hub)
    assert isinstance(error, RefusedError)
    assert error.message == "the server could not prove that it knows the token"


async def test_an_older_version_can_not_be_forced() -> None:
    def change(who: Direction, number: int, frame: bytes) -> Sequence[bytes]:
        if (who, number) != ("client", 0):
            return [frame]
        return [encode_frame(msgspec.structs.replace(msgspec.msgpack.decode(frame[4:], type=m.Hello), protocol=1))]

    hub = kit.Hub()
    async with kit.serving(hub.transport, HOLDING, token=TOKEN) as server, between(kit.at(server), change) as forwarder:
        error = await failed_pull(forwarder.address, hub)
        await kit.until(lambda: server.ended)
    assert isinstance(error, PeerLost)
    (session,) = server.ended
    assert isinstance(session.session.error, RefusedError)
    assert session.session.error.code == "version"


# --- frames that come before their time -------------------------------------------------------------------------------


async def test_frames_that_come_together_with_welcome_have_to_be_authentic() -> None:
    hub = kit.Hub()

    def change(who: Direction, number: int, frame: bytes) -> Sequence[bytes]:
        if (who, number) == ("server", 0):
            return [
                b"".join((frame, encode_frame(m.Accepted(identity=kit.IDENTITY)), encode_frame(kit.announce(HOLDING))))
            ]
        return [frame]

    async with kit.serving(hub.transport, HOLDING, token=TOKEN) as server, between(kit.at(server), change) as forwarder:
        error = await failed_pull(forwarder.address, hub)
    assert "is not authentic" in error.message


async def test_frames_that_come_together_with_hello_have_to_be_authentic() -> None:
    hub = kit.Hub()
    async with kit.serving(hub.transport, HOLDING, token=TOKEN) as server:
        async with kit.fake_client(server) as wire:
            await wire.say(kit.hello(hub.transport, TOKEN), m.Identify(identity=kit.IDENTITY))
            with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError, RemoteProtocolError):
                await wire.closed()
        await kit.until(lambda: server.ended)
    (session,) = server.ended
    assert isinstance(session.session.error, RefusedError)
    assert session.session.error.code == "auth"


async def test_authentic_frames_that_come_together_with_welcome_are_heard() -> None:
    """A server that has to end at once says so in the same packet."""
    hub = kit.Hub()

    async def script(wire: kit.Wire[m.ClientMessage]) -> None:
        await wire.hear_until(m.Hello)
        said: list[bytes] = []
        send, wire.raw = wire.raw, lambda data: _keep(said, data)  # type: ignore[method-assign]
        await wire.prove(TOKEN, kit.welcome(hub.transport))
        await wire.say(m.Goodbye(code="busy", reason="the true reason"))
        await send(b"".join(said))
        wire.raw = send  # type: ignore[method-assign]
        await wire.closed()

    async with kit.fake_server(script) as fake:
        error = await failed_pull(fake.address, hub)
    assert error.message == "the peer ended the session: the true reason"


async def _keep(said: list[bytes], data: bytes) -> None:
    said.append(data)


# --- data connections -------------------------------------------------------------------------------------------------


async def test_who_reads_the_control_connection_can_not_connect_to_the_data_port() -> None:
    """He sees the whole offer, and is faster than the client; the server waits for the one that has the key."""
    carrier, into, refused = kit.carrier("tcp"), kit.blank(SOURCE), anyio.Event()
    offers: list[dict[str, object]] = []

    def change(who: Direction, number: int, frame: bytes) -> Sequence[bytes]:
        message = msgspec.msgpack.decode(frame[4:-16]) if number else {}
        if message.get("type") == "ChannelOffer":
            offers.append(msgspec.msgpack.decode(message["offer"]))
        return [frame]

    async def connect() -> None:
        await kit.until(lambda: offers)
        port = offers[0]["port"]
        assert isinstance(port, int)
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:
            await stream.send(bytes(offers[0]["key"]) + b"\0")  # type: ignore[call-overload]
            with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                raise AssertionError(f"the server answered {await stream.receive()!r}")
            refused.set()

    class Waits:
        """The client's end connects only after the stranger was refused."""

        def __getattr__(self, name: str) -> object:
            return getattr(carrier, name)

        async def connect(self, offer: bytes, setup: object) -> object:
            await refused.wait()
            return await carrier.connect(offer, setup)  # type: ignore[arg-type]

    async with (
        kit.serving(carrier, HOLDING, token=TOKEN) as server,
        between(kit.at(server), change) as forwarder,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(connect)
        await kit.pull(into, [forwarder.address], Waits(), token=TOKEN)  # type: ignore[arg-type]
    assert kit.contents(into) == kit.contents(SOURCE)


@pytest.mark.parametrize("name", ["tcp", "shm"])
async def test_keys_on_data_connections_are_those_of_the_offer_only_without_a_token(name: str) -> None:
    key = bytes(range(KEY_BYTES))
    open_setup = kit.setup()
    assert open_setup.bound(key, "client") == key
    setups = [dataclasses.replace(kit.setup(), data_key=bytes([number]) * 32) for number in (1, 2)]
    bound = {setup.bound(key, purpose) for setup in setups for purpose in ("client", "server")}
    assert len(bound) == 4
    assert key not in bound
    into, carrier = kit.blank(SOURCE), kit.carrier(name)
    async with kit.serving(carrier, HOLDING, token=TOKEN) as server:
        await kit.pull(into, [kit.at(server)], carrier, token=TOKEN)
    assert kit.contents(into) == kit.contents(SOURCE)
