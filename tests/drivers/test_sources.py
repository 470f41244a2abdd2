"""Failover: the next source takes over, verified blocks are kept, and no wrong byte is accepted."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from netloader.core import messages as m
from netloader.core.addresses import Address
from netloader.core.options import Timings
from netloader.core.plan import Ranges
from netloader.core.report import PullReport
from netloader.errors import (
    DigestMismatch,
    NetloaderError,
    NoSourceLeft,
    PeerLost,
    RefusedError,
    RemoteProtocolError,
    RootMismatch,
    TransferTimeout,
    TransportUnavailable,
)
from netloader.tensors.holding import TensorHolding
from netloader.transports.base import Channel, Transport
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport, Side
from netloader.transports.memory import MemoryTransport
from tests.drivers import kit

SOURCE = kit.weights()
HOLDING = kit.held(SOURCE)
BLOCKS = len(HOLDING.announcement.plan.blocks)
ROOT = HOLDING.announcement.root
OTHER = kit.held(kit.weights(seed=1))  # same shapes, other weights
NEVER_CONNECTED = ("cannot be reached", "went away while it connected")


def lockstep() -> kit.Hub:
    """A memory transport without a buffer: blocks sent before a fault have landed."""
    return kit.Hub(0)


def faulty(hub: kit.Hub, *faults: Fault) -> FaultyTransport:
    return FaultyTransport(hub.transport, Faults(faults))


def cause_of(error: NoSourceLeft, place: int = 0) -> NetloaderError:
    return error.attempts[place].cause


async def fails(into: kit.Tensors, sources: list[Address], transport: Transport, **options: Any) -> NoSourceLeft:
    with pytest.raises(NoSourceLeft) as caught:
        await kit.pull(into, sources, transport, **options)
    for attempt in caught.value.attempts:
        assert attempt.message.startswith(f"{attempt.source}: ")
        assert attempt.hint, attempt
        assert attempt.cause.story or any(text in attempt.message for text in NEVER_CONNECTED), attempt
        assert attempt.message in str(caught.value)
    return caught.value


async def completes(
    into: kit.Tensors, sources: list[Address], transport: Transport, **options: Any
) -> tuple[PullReport, list[int]]:
    """A pull that completes; returns its report and the number of blocks from each source."""
    report = await kit.pull(into, sources, transport, **options)
    assert kit.contents(into) == kit.contents(SOURCE)
    assert report.root == ROOT
    shares = [report.sources[str(source)].blocks if str(source) in report.sources else 0 for source in sources]
    assert sum(shares) == report.blocks == BLOCKS
    assert sum(share.nbytes for share in report.sources.values()) == report.nbytes == HOLDING.announcement.plan.nbytes
    return report, shares


@asynccontextmanager
async def unreachable() -> AsyncIterator[Address]:
    """An address at which no process can listen: a bound socket that does not listen keeps it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield Address("127.0.0.1", bound.getsockname()[1])


# --- sources that give nothing --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_leaked_descriptors")
async def test_the_last_source_completes_after_sources_that_refuse_are_down_are_silent_or_send_garbage() -> None:
    hub = kit.Hub()

    async def say_nothing(wire: kit.Wire[m.ClientMessage]) -> None:
        await wire.closed()

    async def talk_http(wire: kit.Wire[m.ClientMessage]) -> None:
        await wire.raw(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        await wire.closed()

    async with (
        kit.serving(hub.transport, kit.held(SOURCE, kit.variant(model="another"))) as refusing,
        kit.serving(hub.transport, HOLDING) as good,
        kit.fake_server(say_nothing) as silent,
        kit.fake_server(talk_http) as garbage,
        unreachable() as down,
    ):
        bad = [kit.at(refusing), down, silent.address, garbage.address]
        into = kit.blank(SOURCE)
        report, shares = await completes(into, [*bad, kit.at(good)], hub.transport, timings=kit.QUICK)
        assert shares == [0, 0, 0, 0, BLOCKS]
        assert report.retries == 4

        untouched = kit.blank(SOURCE)
        error = await fails(untouched, bad, hub.transport, timings=kit.QUICK)
        assert kit.contents(untouched) == kit.contents(kit.blank(SOURCE))
        assert (error.verified, error.total) == (0, None)
        kinds = [type(cause_of(error, place)) for place in range(4)]
        assert kinds == [RefusedError, PeerLost, TransferTimeout, RemoteProtocolError]
        assert [attempt.source for attempt in error.attempts] == [str(source) for source in bad]
        for text in (
            "model is 'another'",
            "cannot be reached",
            f"did not answer within {kit.QUICK.hello:g} s",
            "1213486160 bytes",
        ):
            assert text in str(error)
        assert "set MODEL" in error.hint


async def test_a_source_without_a_common_transport_is_dropped_at_once() -> None:
    ours, theirs = kit.Hub(), kit.Hub()
    async with kit.serving(theirs.transport, HOLDING) as server:
        error = await fails(kit.blank(SOURCE), [kit.at(server)], ours.transport, wait=kit.PATIENCE)
    assert isinstance(cause_of(error), TransportUnavailable)
    assert "differ in hub" in str(error)


async def test_the_reason_for_a_refusal_arrives_although_the_server_closed_with_unread_input() -> None:
    hub = kit.Hub()

    async def refuse(wire: kit.Wire[m.ClientMessage]) -> None:
        # Sends its last message with the client's Hello still unread, and closes: the kernel then sends RST.
        await wire.say(m.Refusal(code="busy", message="come back on Monday"))
        await wire.stream.send_eof()
        await wire.closed()

    async with kit.fake_server(refuse) as fake:
        error = await fails(kit.blank(SOURCE), [fake.address], hub.transport)
    assert "come back on Monday" in str(error)


# --- sources that fail in the middle --------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_leaked_descriptors")
@pytest.mark.parametrize("at", [0, 1, 20, BLOCKS - 1])
@pytest.mark.parametrize("side", list(Side))
async def test_a_source_that_was_cut_off_is_tried_again_and_verified_blocks_are_kept(at: int, side: Side) -> None:
    hub = lockstep()
    cut = faulty(hub, Fault(FaultKind.CUT, at, side=side))
    theirs, ours = (cut, hub.transport) if side is Side.SEND else (hub.transport, cut)
    into = kit.blank(SOURCE)
    async with kit.serving(theirs, HOLDING) as first, kit.serving(hub.transport, HOLDING) as second:
        report, shares = await completes(into, [kit.at(first), kit.at(second)], ours)
        # The same source is tried again if blocks came from it; otherwise the next one.
        assert shares == ([BLOCKS, 0] if at > 0 else [0, BLOCKS])
        assert report.retries == 1


@pytest.mark.parametrize("at", [1, 20, BLOCKS - 1])
async def test_a_source_that_fails_twice_is_left_and_the_next_sends_only_the_missing_blocks(at: int) -> None:
    hub = lockstep()
    theirs = faulty(hub, Fault(FaultKind.CUT, at, times=None))
    into = kit.blank(SOURCE)
    sent: dict[str, int] = {}
    async with kit.serving(theirs, HOLDING) as first, kit.serving(hub.transport, HOLDING) as second:
        sources = [kit.at(first), kit.at(second)]
        report, shares = await completes(into, sources, watched(hub.transport, sent))
        assert shares == [at, BLOCKS - at]
        assert sent["blocks"] == BLOCKS  # no block was requested twice
        assert report.retries == 2

        error = await fails(kit.blank(SOURCE), sources[:1], hub.transport)
        assert error.verified == sum(b.nbytes for b in HOLDING.announcement.plan.blocks[:at])
        assert error.total == HOLDING.announcement.plan.nbytes
        assert isinstance(cause_of(error), PeerLost | RefusedError)


def watched(inner: Transport, account: dict[str, int]) -> Transport:
    """A transport that counts landed blocks."""

    class Watched(MemoryTransport):
        async def connect(self, offer: bytes, setup: object) -> Channel:
            channel = await inner.connect(offer, setup)  # type: ignore[arg-type]
            receive = channel.recv

            async def recv(blocks: object, landed: object = None) -> None:
                def count(view: object) -> None:
                    account["blocks"] = account.get("blocks", 0) + 1
                    landed(view)  # type: ignore[operator]

                await receive(blocks, count)  # type: ignore[arg-type]

            channel.recv = recv  # type: ignore[method-assign]
            return channel

    assert isinstance(inner, MemoryTransport)
    return Watched(inner._hub)


@pytest.mark.parametrize("at", [0, 20])
async def test_a_source_that_stalls_is_left_and_verified_blocks_are_kept(at: int) -> None:
    hub = lockstep()
    theirs = faulty(hub, Fault(FaultKind.STALL, at, times=None))
    into = kit.blank(SOURCE)
    async with kit.serving(theirs, HOLDING) as first, kit.serving(hub.transport, HOLDING) as second:
        sources = [kit.at(first), kit.at(second)]
        _, shares = await completes(into, sources, hub.transport, timings=kit.QUICK)
        assert shares == [at, BLOCKS - at]
        error = await fails(kit.blank(SOURCE), sources[:1], hub.transport, timings=kit.QUICK)
        assert isinstance(cause_of(error), TransferTimeout)
        await kit.until(lambda: first.sessions == ())


@pytest.mark.usefixtures("no_leaked_descriptors")
async def test_a_source_that_timed_out_the_client_is_tried_again_after_all_others() -> None:
    hub = lockstep()
    patient = replace(kit.QUICK, stall=kit.CALM.stall)
    mute = faulty(hub, Fault(FaultKind.STALL, 20, side=Side.RECV))  # this client stalls, once
    into = kit.blank(SOURCE)
    async with kit.serving(hub.transport, HOLDING, timings=kit.QUICK) as server:
        report, shares = await completes(into, [kit.at(server)], mute, timings=patient)
        assert shares == [BLOCKS]
        assert report.retries == 1
        assert "the peer takes no bytes" in report.attempts[0].message
    mute = faulty(hub, Fault(FaultKind.STALL, 20, side=Side.RECV))
    into = kit.blank(SOURCE)
    async with (
        kit.serving(hub.transport, HOLDING, timings=kit.QUICK) as server,
        kit.serving(hub.transport, HOLDING) as other,
    ):
        _, shares = await completes(into, [kit.at(server), kit.at(other)], mute, timings=patient)
        assert shares == [20, BLOCKS - 20]


@pytest.mark.parametrize(
    ("kind", "at"),
    [
        *((kind, at) for kind in (FaultKind.CORRUPT, FaultKind.DROP) for at in (0, 20, BLOCKS - 1)),
        *((FaultKind.SWAP, at) for at in (0, 20)),
    ],
)
async def test_a_source_that_corrupts_a_block_is_left_with_the_block_named(kind: FaultKind, at: int) -> None:
    hub = lockstep()
    theirs = faulty(hub, Fault(kind, at, byte=7, other=at + 1, times=None))
    into = kit.blank(SOURCE)
    async with kit.serving(theirs, HOLDING) as first, kit.serving(hub.transport, HOLDING) as second:
        sources = [kit.at(first), kit.at(second)]
        timings = kit.QUICK if kind is FaultKind.DROP else kit.CALM
        _, shares = await completes(into, sources, hub.transport, timings=timings)
        assert shares == [at, BLOCKS - at]
        error = await fails(kit.blank(SOURCE), sources[:1], hub.transport, timings=timings)
        cause = cause_of(error)
        if kind is FaultKind.DROP and at == BLOCKS - 1:
            assert isinstance(cause, TransferTimeout)
            return
        assert isinstance(cause, DigestMismatch)
        assert cause.block == at
        assert cause.tensors == HOLDING.announcement.plan.tensors_of(at)
        assert cause.expected == HOLDING.announcement.digests[16 * at : 16 * at + 16].hex()
        assert cause.actual != cause.expected


@pytest.mark.usefixtures("no_leaked_descriptors")
async def test_blocks_that_a_source_no_longer_has_come_from_the_next_one() -> None:
    hub = kit.Hub()
    theirs = kit.weights()
    weak = kit.held_weakly(theirs)
    into = kit.blank(SOURCE)
    async with kit.serving(hub.transport, weak) as first, kit.serving(hub.transport, HOLDING) as second:
        del theirs["large"]
        sources = [kit.at(first), kit.at(second)]
        _, shares = await completes(into, sources, hub.transport)
        assert 0 < shares[0] < BLOCKS
        error = await fails(kit.blank(SOURCE), sources[:1], hub.transport)
        assert "could not give every block" in str(error)
        assert "large was dropped by its owner" in str(error)
        assert error.verified > 0


# --- other weights --------------------------------------------------------------------------------------------------


async def test_other_weights_of_equal_shape_are_refused_in_the_middle_of_a_pull() -> None:
    hub = lockstep()
    theirs = faulty(hub, Fault(FaultKind.CUT, 20, times=None))
    into = kit.blank(SOURCE)
    async with (
        kit.serving(theirs, HOLDING) as dying,
        kit.serving(hub.transport, OTHER) as other,
        kit.serving(hub.transport, HOLDING) as good,
    ):
        sources = [kit.at(dying), kit.at(other), kit.at(good)]
        report, shares = await completes(into, sources, hub.transport)
        assert shares == [20, 0, BLOCKS - 20]
        told = [attempt.message for attempt in report.attempts if attempt.source == str(kit.at(other))]
        assert len(told) == 1
        assert ROOT in told[0]
        assert OTHER.announcement.root in told[0]

        error = await fails(kit.blank(SOURCE), sources[:2], hub.transport)
        assert "one checkpoint only" in error.hint


async def test_another_root_is_detected_by_the_client_when_the_server_does_not_compare() -> None:
    hub = lockstep()
    into = kit.blank(SOURCE)
    async with (
        kit.serving(faulty(hub, Fault(FaultKind.CUT, 20, times=None)), HOLDING) as dying,
        lying_server(hub, OTHER) as liar,
    ):
        error = await fails(into, [kit.at(dying), liar], hub.transport)
    assert isinstance(cause_of(error, -1), RootMismatch)


async def test_a_source_without_the_expected_root_is_refused() -> None:
    hub = kit.Hub()
    async with kit.serving(hub.transport, HOLDING) as server, kit.serving(hub.transport, OTHER) as other:
        report, shares = await completes(
            kit.blank(SOURCE), [kit.at(other), kit.at(server)], hub.transport, expect_root=ROOT
        )
        assert shares == [0, BLOCKS]
        assert report.retries == 1
        error = await fails(kit.blank(SOURCE), [kit.at(other)], hub.transport, expect_root=ROOT)
        assert ROOT in str(error)
    async with lying_server(hub, OTHER) as liar:
        error = await fails(kit.blank(SOURCE), [liar], hub.transport, expect_root=ROOT)
        assert isinstance(cause_of(error), RootMismatch)
        assert "EXPECT_ROOT" in str(error)


# --- scripted servers -----------------------------------------------------------------------------------------------


STEPS = (
    *("connected", "hello", "welcome", "identify", "waiting", "accepted", "announce"),
    *("agree", "offer", "want", "grant"),
)


class Scripted:
    """A server that follows the protocol up to a step, and then does something else."""

    def __init__(self, hub: kit.Hub, holding: TensorHolding = HOLDING, **changed: Any) -> None:
        self.hub = hub
        self.holding = holding
        self.announce = kit.announce(holding, **changed)

    async def until(self, wire: kit.Wire[m.ClientMessage], last: str) -> Channel | None:
        """Take part up to and including step `last`."""
        transport = self.hub.transport
        channel: Channel | None = None
        for step in STEPS[: STEPS.index(last) + 1]:
            match step:
                case "hello":
                    await wire.hear_until(m.Hello)
                case "welcome":
                    await wire.say(kit.welcome(transport))
                case "identify":
                    await wire.hear_until(m.Identify)
                case "waiting":
                    await wire.say(m.Waiting(reason="a while"))
                case "accepted":
                    await wire.say(m.Accepted(identity=kit.IDENTITY))
                case "announce":
                    await wire.say(self.announce)
                case "agree":
                    await wire.hear_until(m.Agree)
                case "offer":
                    pending = await transport.offer(kit.setup())
                    await wire.say(m.ChannelOffer(transport=transport.name, offer=pending.offer))
                    channel = await pending.accept()
                case "want":
                    await wire.hear_until(m.Want)
                case "grant":
                    await wire.say(m.Grant(ranges=((0, BLOCKS),)))
        return channel


@asynccontextmanager
async def lying_server(hub: kit.Hub, holding: TensorHolding = HOLDING, **changed: Any) -> AsyncIterator[Address]:
    """A server with an announcement that may be wrong, which sends the blocks of `holding` if they are requested."""
    scripted = Scripted(hub, holding, **changed)

    async def script(wire: kit.Wire[m.ClientMessage]) -> None:
        channel = await scripted.until(wire, "grant")
        assert channel is not None
        numbers = range(BLOCKS)
        with contextlib.suppress(NetloaderError):
            await channel.send(holding.memory.views(holding.announcement.plan, numbers))
        await wire.closed()
        await channel.aclose()

    async with kit.fake_server(script) as fake:
        yield fake.address


async def then_good(bad: Address, hub: kit.Hub, timings: Timings = kit.CALM) -> NoSourceLeft:
    """Pull from `bad` and a good source, then from `bad` alone; return the error of the latter."""
    async with kit.serving(hub.transport, HOLDING) as good:
        await completes(kit.blank(SOURCE), [bad, kit.at(good)], hub.transport, timings=timings)
    into = kit.blank(SOURCE)
    error = await fails(into, [bad], hub.transport, timings=timings)
    right, found = kit.contents(SOURCE), kit.contents(into)
    assert error.verified <= HOLDING.announcement.plan.nbytes
    if not error.verified:
        assert all(found[name] != right[name] for name in right if right[name])
    return error


@pytest.mark.usefixtures("no_leaked_descriptors")
@pytest.mark.parametrize("how", ["close", "reset", "silence", "garbage", "huge"])
async def test_a_server_that_violates_the_protocol_at_any_step_is_left_for_the_next_source(how: str) -> None:
    for step in STEPS if how in ("close", "garbage") else STEPS[::2]:
        await violate_the_protocol(how, step)


async def violate_the_protocol(how: str, step: str) -> None:
    hub = kit.Hub()
    scripted = Scripted(hub)

    async def script(wire: kit.Wire[m.ClientMessage]) -> None:
        channel = await scripted.until(wire, step)
        match how:
            case "close":
                pass
            case "reset":
                await wire.reset()
            case "silence":
                await wire.closed()
            case "garbage":
                await wire.raw(b"\x00\x00\x00\x05hello")
                await wire.closed()
            case "huge":
                await wire.raw(b"\xff\xff\xff\xff" + bytes(1000))
                await wire.closed()
        if channel is not None:
            await channel.aclose()

    async with kit.fake_server(script) as fake:
        error = await then_good(fake.address, hub, kit.QUICK if how == "silence" else kit.CALM)
    cause = cause_of(error)
    match how:
        case "close" | "reset":
            assert isinstance(cause, PeerLost), (step, cause)
        case "silence":
            assert isinstance(cause, TransferTimeout), (step, cause)
        case _:
            assert isinstance(cause, RemoteProtocolError | PeerLost), (step, cause)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"root": "0" * 64}, "announced root 0000"),
        ({"digests": bytes(16 * BLOCKS)}, "its own digests give"),
        ({"digests": bytes(16)}, "derived different blocks"),
        ({"plan": "0" * 64}, "derived different blocks"),
        ({"block_bytes": 2048}, "derived different blocks"),
        ({"manifest": kit.held({"a": SOURCE["large"]}).announcement.manifest}, "tensors differ"),
        ({"algorithm": "crc32"}, "its own digests give"),
    ],
)
async def test_an_announcement_that_is_wrong_or_does_not_fit_is_refused(changed: dict[str, Any], reason: str) -> None:
    hub = kit.Hub()
    async with lying_server(hub, **changed) as liar:
        error = await then_good(liar, hub)
    assert reason in str(error)
    assert error.verified == 0


async def test_an_unknown_digest_algorithm_is_refused() -> None:
    from netloader.core.manifest import compute_root

    hub, known = kit.Hub(), HOLDING.announcement
    root = compute_root(known.manifest, known.plan.block_bytes, "md2", known.digests)
    async with lying_server(hub, algorithm="md2", root=root) as liar:
        error = await fails(kit.blank(SOURCE), [liar], hub.transport)
    assert "md2" in str(error)


@pytest.mark.parametrize("ranges", [((0, BLOCKS + 1),), ((5, 5),), ((3, 5), (4, 6)), ()])
@pytest.mark.parametrize("kind", [m.Grant, m.Gone])
async def test_invalid_ranges_in_an_answer_end_the_session(kind: type[m.Grant | m.Gone], ranges: Ranges) -> None:
    hub = kit.Hub()
    scripted = Scripted(hub)

    async def script(wire: kit.Wire[m.ClientMessage]) -> None:
        channel = await scripted.until(wire, "want")
        extra = {"reason": "lost"} if kind is m.Gone else {}
        await wire.say(kind(ranges=ranges, **extra))  # type: ignore[arg-type]
        await wire.closed()
        assert channel is not None
        await channel.aclose()

    async with kit.fake_server(script) as fake:
        error = await then_good(fake.address, hub)
    assert isinstance(cause_of(error), RemoteProtocolError)


async def test_a_second_grant_of_the_same_blocks_ends_the_session() -> None:
    hub = kit.Hub()
    scripted = Scripted(hub)

    async def script(wire: kit.Wire[m.ClientMessage]) -> None:
        channel = await scripted.until(wire, "grant")
        await wire.say(m.Grant(ranges=((0, 1),)))
        await wire.closed()
        assert channel is not None
        await channel.aclose()

    async with kit.fake_server(script) as fake:
        error = await then_good(fake.address, hub)
    assert "not requested" in str(error)


async def test_too_many_signals_end_the_session() -> None:
    hub = kit.Hub()
    scripted = Scripted(hub)

    async def script(wire: kit.Wire[m.ClientMessage]) -> None:
        await scripted.until(wire, "agree")
        for _ in range(40):
            await wire.say(m.Signal(data=bytes(65536)))
        await wire.closed()

    async with kit.fake_server(script) as fake:
        error = await then_good(fake.address, hub)
    assert "signals" in str(error)


async def test_many_grants_of_single_blocks_are_accepted() -> None:
    hub = kit.Hub()
    scripted = Scripted(hub)

    async def script(wire: kit.Wire[m.ClientMessage]) -> None:
        channel = await scripted.until(wire, "want")
        await wire.say(*(m.Grant(ranges=((number, number + 1),)) for number in range(BLOCKS)))
        assert channel is not None
        await channel.send(HOLDING.memory.views(HOLDING.announcement.plan, range(BLOCKS)))
        await wire.hear_until(m.Verdict)
        await wire.say(m.Goodbye())
        await wire.closed()
        await channel.aclose()

    into = kit.blank(SOURCE)
    async with kit.fake_server(script) as fake:
        report, shares = await completes(into, [fake.address], hub.transport)
    assert shares == [BLOCKS]
    assert report.retries == 0
