"""Conformance checks: what every transport has to do, for authors of transports.

``await check_transport(pair_maker(MyTransport()))`` runs all checks. Each check opens its own pairs of channels within
one process. No test framework is needed: a failure is raised as :class:`Failed`, which names the check.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import anyio

from netloader.errors import ChannelBusy, ChannelClosed, PeerLost, TransferTimeout
from netloader.transports.base import BlockView, Channel
from netloader.transports.conformance_kit import (
    PATIENCE,
    Failed,
    LocalSignals,
    MakePair,
    RunningCall,
    TensorBlockView,
    live_threads,
    local_signals,
    mixed_blocks,
    open_descriptors,
    pair_maker,
    raises,
    require,
    run_pipelined,
    started,
    within,
)
from netloader.transports.contract_0_1 import adapted_pairs

__all__ = [
    "CHECKS",
    "Check",
    "Failed",
    "LocalSignals",
    "MakePair",
    "TensorBlockView",
    "check_transport",
    "local_signals",
    "pair_maker",
]

Check = Callable[[MakePair], Awaitable[None]]

_MIB = 1 << 20
_WAYS = 16
"""The most blocks that any channel is expected to move in parallel."""

_STALL = 0.3
_LATER = 0x5A


async def check_transport(make_pair: MakePair, checks: Sequence[Check] | None = None) -> None:
    """Run conformance checks.

    Args:
        make_pair: Opens pairs; see :func:`pair_maker`.
        checks: The checks to run; by default all of :data:`CHECKS`.

    Raises:
        Failed: The first check that failed, and why.
    """
    make_pair = adapted_pairs(make_pair)
    for check in CHECKS if checks is None else checks:
        try:
            with within(4 * PATIENCE, "it does not end"):
                await check(make_pair)
        except Exception as error:
            raise Failed(f"{check.__name__}: {_innermost(error)}") from error


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


# --- what arrives -----------------------------------------------------------------------------------------------------


async def blocks_arrive_whole_and_in_order(make_pair: MakePair) -> None:
    """Blocks of all shapes arrive from server to client, grouped into different calls on both sides."""
    async with make_pair() as (server, client):
        await _carry(server, client)


async def blocks_travel_both_ways_at_once(make_pair: MakePair) -> None:
    """Each direction is independent of the other."""
    async with make_pair() as (server, client), anyio.create_task_group() as tasks:
        tasks.start_soon(_carry, client, server)
        await _carry(server, client)


async def both_ends_say_what_they_take(make_pair: MakePair) -> None:
    """Both ends have valid attributes `depth` and `whole_blocks`."""
    async with make_pair() as ends:
        for channel in ends:
            depth, whole = channel.depth, channel.whole_blocks
            require(type(depth) is int and depth >= 1, f"depth is {depth!r}, not a number from 1 on")
            require(type(whole) is bool, f"whole_blocks is {whole!r}, neither True nor False")


async def many_small_calls_in_a_row(make_pair: MakePair) -> None:
    """One block per call, many calls."""
    async with make_pair() as (server, client), anyio.create_task_group() as tasks:
        sent = [TensorBlockView(number, [os.urandom(1 + number % 7)]) for number in range(100)]
        into = _like(sent)

        async def send() -> None:
            for block in sent:
                await server.send([block])

        tasks.start_soon(send)
        for block in into:
            await client.recv([block])
        _same(sent, into)


async def landed_is_called_once_for_each_block_with_the_bytes_in_place(make_pair: MakePair) -> None:
    """Later blocks of the same call may still be in flight at that time."""
    async with make_pair() as (server, client), anyio.create_task_group() as tasks:
        sent = mixed_blocks()
        into = _like(sent)
        landed: list[tuple[int, bytes]] = []
        tasks.start_soon(server.send, sent)
        await client.recv(into, lambda view: landed.append((view.number, into[view.number].data)))
        called = sorted(number for number, _ in landed)
        require(called == [block.number for block in sent], "landed was not called once for each block")
        require(
            all(data == sent[number].data for number, data in landed), "landed was called before the bytes were there"
        )


async def memory_may_be_reused_when_send_returns(make_pair: MakePair) -> None:
    """The receiver does not get bytes that the sender writes afterwards."""
    async with make_pair() as (server, client), anyio.create_task_group() as tasks:
        sent = TensorBlockView(0, [bytes([1]) * 300_000, bytes([2]) * 5])
        expected = sent.data
        into = _like([sent])
        receiving = RunningCall(tasks, lambda: client.recv(into))
        await server.send([sent])
        sent.fill(_LATER)
        await receiving.value()
        require(into[0].data == expected, "the receiver got what was written after send had returned")


async def nothing_to_send_is_fine(make_pair: MakePair) -> None:
    """Empty calls and empty blocks are allowed."""
    async with make_pair() as (server, client), anyio.create_task_group() as tasks:
        await server.send([])
        await client.recv([])
        blocks = [TensorBlockView(0, []), TensorBlockView(1, [b"", b""]), TensorBlockView(2, [b"x"])]
        into = _like(blocks)
        seen: list[int] = []
        tasks.start_soon(server.send, blocks)
        await client.recv(into, lambda view: seen.append(view.number))
        _same(blocks, into)
        require(sorted(seen) == [0, 1, 2], "landed is called for empty blocks, too")


# --- how it ends ------------------------------------------------------------------------------------------------------


async def an_error_of_landed_ends_the_channel(make_pair: MakePair) -> None:
    """Recv raises the same error, and the peer's operations fail."""

    class Unwelcome(Exception):
        pass

    def landed(view: BlockView) -> None:
        if view.number == 1:
            raise Unwelcome

    async with make_pair() as (server, client), anyio.create_task_group() as tasks:
        sending = RunningCall(tasks, lambda: _send_until_lost(server))
        try:
            await client.recv([TensorBlockView(number, [bytes(_MIB)]) for number in range(4)], landed)
        except Unwelcome:
            pass
        else:
            raise Failed("recv did not raise what landed raised")
        with raises(ChannelClosed, "recv after landed had raised"):
            await client.recv(_like([TensorBlockView(0, [b"x"])]))
        await client.aclose()
        await sending.ends_with(PeerLost, "the peer's send after landed had raised")


async def closing_twice_is_fine(make_pair: MakePair) -> None:
    """Twice in a row, twice at the same time, and after the peer has closed."""
    async with make_pair() as (server, client):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.aclose)
            tasks.start_soon(server.aclose)
        await server.aclose()
        await client.aclose()
        await client.aclose()


async def nothing_works_after_closing(make_pair: MakePair) -> None:
    """Operations raise ChannelClosed on this side, and PeerLost at the peer."""
    for index in range(2):
        async with make_pair() as pair:
            closed, other = pair[index], pair[1 - index]
            await closed.aclose()
            block = TensorBlockView(0, [b"x"])
            with raises(ChannelClosed, "send after aclose"):
                await closed.send([block])
            with raises(ChannelClosed, "recv after aclose"):
                await closed.recv([block])
            with raises(PeerLost, "the peer's recv after aclose"):
                await other.recv([block])
        async with make_pair() as pair:
            await pair[index].aclose()
            with raises(PeerLost, "the peer's send after aclose"):
                await _send_until_lost(pair[1 - index])


async def closing_ends_what_is_blocked(make_pair: MakePair) -> None:
    """An operation on this side ends with ChannelClosed, one at the peer with PeerLost. No more bytes are written."""
    for closer in ("receiver", "sender"):
        async with make_pair() as (server, client), anyio.create_task_group() as tasks:
            receiving, into = await _blocked_recv(tasks, server, client)
            await (client if closer == "receiver" else server).aclose()
            if closer == "receiver":
                before = _snapshot(into)
                await receiving.ends_with(ChannelClosed, "recv when the channel was closed here")
                with raises(PeerLost, "the peer's send into a closed channel"):
                    await _send_until_lost(server)
                require(_snapshot(into) == before, "bytes landed after aclose had returned")
            else:
                await receiving.ends_with(PeerLost, "recv when the peer closed")
        async with make_pair() as (server, client), anyio.create_task_group() as tasks:
            sending = await _blocked_send(tasks, server, client)
            await (client if closer == "receiver" else server).aclose()
            await sending.ends_with(
                PeerLost if closer == "receiver" else ChannelClosed, f"a blocked send when the {closer} closed"
            )


async def cancelling_ends_the_channel(make_pair: MakePair) -> None:
    """An operation that is cancelled before it starts, or while it is blocked, ends soon and ends the channel."""
    for index in range(2):
        for direction in ("send", "recv"):
            async with make_pair() as pair:
                here, there = pair[index], pair[1 - index]
                block = _large()
                with anyio.CancelScope() as scope:
                    scope.cancel()
                    await (here.send if direction == "send" else here.recv)([block])
                require(scope.cancelled_caught, f"a {direction} that was cancelled before it started ran")
                await _is_over(here, there)
    for direction in ("send", "recv"):
        async with make_pair() as (server, client), anyio.create_task_group() as tasks:
            if direction == "send":
                await (await _blocked_send(tasks, server, client)).cancelled()
                await _is_over(server, client)
            else:
                receiving, _ = await _blocked_recv(tasks, server, client)
                await receiving.cancelled()
                await _is_over(client, server)


async def no_byte_lands_after_a_cancelled_recv(make_pair: MakePair) -> None:
    """This holds even if the peer continues to send."""
    async with make_pair() as (server, client), anyio.create_task_group() as tasks:
        receiving, into = await _blocked_recv(tasks, server, client)
        sending = RunningCall(tasks, lambda: _send_until_lost(server))
        await receiving.cancelled()
        before = _snapshot(into)
        await client.aclose()
        await sending.ends_with(PeerLost, "send to a peer that gave up")
        require(_snapshot(into) == before, "bytes landed after a cancelled recv had returned")


async def a_cut_in_full_flight_ends_everything(make_pair: MakePair) -> None:
    """While large blocks are in flight in both directions, a cut ends every operation on both sides."""
    for cut in ("server closes", "client closes", "a recv is cancelled", "a send is cancelled"):
        async with make_pair() as (server, client), anyio.create_task_group() as tasks:
            landed = threading.Event()
            receiving = [RunningCall(tasks, partial(_recv_in_bulk, end, landed)) for end in (client, server)]
            sending = [RunningCall(tasks, partial(_send_in_bulk, end)) for end in (server, client)]
            await _is_set(landed, "nothing lands when blocks travel in both directions")
            match cut:
                case "server closes":
                    await server.aclose()
                case "client closes":
                    await client.aclose()
                case "a recv is cancelled":
                    receiving[0].scope.cancel()
                case _:
                    sending[0].scope.cancel()
            for operation in (*receiving, *sending):
                await operation.wait()
                require(
                    operation.scope.cancelled_caught or isinstance(operation.error, PeerLost | ChannelClosed),
                    f"an operation ended with {operation.error!r} when {cut}",
                )


async def no_more_calls_than_the_channel_takes(make_pair: MakePair) -> None:
    """One call more than the channel's depth raises ChannelBusy, and the others continue."""
    async with make_pair() as (server, client), anyio.create_task_group() as tasks:
        receiving, into = await _blocked_recv(tasks, server, client)
        behind = [TensorBlockView(9, [bytes(7)]) for _ in range(client.depth - 1)]
        waiting = [await started(tasks, partial(client.recv, [block])) for block in behind]
        with raises(ChannelBusy, "a recv too many"):
            await client.recv([TensorBlockView(9, [b"x"])])
        rest = [TensorBlockView(block.number, [os.urandom(block.nbytes)]) for block in (*into[1:], *behind)]
        await server.send(rest)
        for operation in (receiving, *waiting):
            await operation.value()
        _same(rest, [*into[1:], *behind])
    async with make_pair() as (server, client), anyio.create_task_group() as tasks:
        sending = await _blocked_send(tasks, server, client)
        # More blocks than any channel moves in parallel, so that none of these calls completes by itself.
        behind = [_large()] * _WAYS
        waiting = [await started(tasks, partial(server.send, behind)) for _ in range(server.depth - 1)]
        with raises(ChannelBusy, "a send too many"):
            await server.send([TensorBlockView(9, [b"x"])])
        require(not sending.over, "a send too many ended the first")
        await server.aclose()
        for operation in (sending, *waiting):
            await operation.ends_with(ChannelClosed, "a send that was open when its channel was closed")


async def calls_made_ahead_are_carried_out_in_order(make_pair: MakePair) -> None:
    """With `depth` calls open at both ends, and blocks grouped into different calls."""
    async with make_pair() as (server, client), anyio.create_task_group() as tasks:
        sent = [TensorBlockView(number, [os.urandom(1 + number * 7919 % 50_000)]) for number in range(120)]
        into = _like(sent)
        landed: list[int] = []
        tasks.start_soon(run_pipelined, server, [partial(server.send, sent[i : i + 2]) for i in range(0, 120, 2)])
        receives = [
            partial(client.recv, into[i : i + 3], lambda block: landed.append(block.number)) for i in range(0, 120, 3)
        ]
        await run_pipelined(client, receives)
        require(sorted(landed) == list(range(120)), "landed was not called once for each block")
        _same(sent, into)


async def a_silent_peer_is_not_waited_for(make_pair: MakePair) -> None:
    """Recv and send raise TransferTimeout after the stall time without progress."""
    async with make_pair(stall=_STALL) as (server, client):
        with raises(TransferTimeout, "recv from a silent peer"):
            await client.recv([TensorBlockView(0, [bytes(10)])])
        await _is_over(client, server)
    async with make_pair(stall=_STALL) as (server, client):
        with raises(TransferTimeout, "send to a peer that does not receive"):
            await server.send([_large()] * 2)
        await _is_over(server, client)


async def everything_is_freed(make_pair: MakePair) -> None:
    """No threads or descriptors are left after a channel ended, well or with an error."""

    async def round_trip() -> None:
        async with make_pair() as (server, client), anyio.create_task_group() as tasks:
            tasks.start_soon(server.send, [TensorBlockView(0, [b"abc"])])
            await client.recv([TensorBlockView(0, [bytes(3)])])
        async with make_pair() as (server, client), anyio.create_task_group() as tasks:
            receiving, _ = await _blocked_recv(tasks, server, client)
            await receiving.cancelled()

    await round_trip()  # what is made once per process is made here
    threads, descriptors = live_threads(), open_descriptors()
    for _ in range(3):
        await round_trip()
    require(not live_threads() - threads, f"threads were left: {live_threads() - threads}")
    now = open_descriptors()
    new = [what for number, what in now.items() if descriptors.get(number) != what]
    require(len(now) <= len(descriptors), f"{len(now) - len(descriptors)} descriptors were left, of {new}")


CHECKS: tuple[Check, ...] = (
    blocks_arrive_whole_and_in_order,
    blocks_travel_both_ways_at_once,
    both_ends_say_what_they_take,
    many_small_calls_in_a_row,
    landed_is_called_once_for_each_block_with_the_bytes_in_place,
    memory_may_be_reused_when_send_returns,
    nothing_to_send_is_fine,
    an_error_of_landed_ends_the_channel,
    closing_twice_is_fine,
    nothing_works_after_closing,
    closing_ends_what_is_blocked,
    cancelling_ends_the_channel,
    no_byte_lands_after_a_cancelled_recv,
    a_cut_in_full_flight_ends_everything,
    no_more_calls_than_the_channel_takes,
    calls_made_ahead_are_carried_out_in_order,
    a_silent_peer_is_not_waited_for,
    everything_is_freed,
)
"""All checks. They are independent of each other."""


# --- parts of checks --------------------------------------------------------------------------------------------------


def _like(blocks: Sequence[TensorBlockView]) -> list[TensorBlockView]:
    return [TensorBlockView(block.number, [bytes(span.numel()) for span in block.tensors()]) for block in blocks]


def _same(sent: Sequence[TensorBlockView], received: Sequence[TensorBlockView]) -> None:
    for ours, theirs in zip(sent, received, strict=True):
        require(ours.data == theirs.data, f"block {ours.number} ({ours.nbytes} bytes) arrived changed")


async def _carry(sender: Channel, receiver: Channel) -> None:
    sent = mixed_blocks()
    into = _like(sent)

    async def send() -> None:
        for cut in (slice(0, 1), slice(1, 1), slice(1, 6), slice(6, None)):
            await sender.send(sent[cut])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        for cut in (slice(0, 3), slice(3, 4), slice(4, None)):
            await receiver.recv(into[cut])
    _same(sent, into)


async def _send_until_lost(channel: Channel) -> None:
    """Send until the loss of the peer is detected, which may take a while."""
    block = TensorBlockView(0, [bytes([_LATER]) * _MIB])
    for _ in range(1024):
        await channel.send([block])


async def _send_in_bulk(channel: Channel) -> None:
    blocks = [TensorBlockView.zeros(number, 2 * _MIB) for number in range(4)] * 4
    for _ in range(64):
        await channel.send(blocks)


async def _recv_in_bulk(channel: Channel, landed: threading.Event) -> None:
    blocks = [TensorBlockView.zeros(number, 2 * _MIB) for number in range(4)] * 4
    for _ in range(64):
        await channel.recv(blocks, lambda _: landed.set())


async def _blocked_recv(
    tasks: anyio.abc.TaskGroup, sender: Channel, receiver: Channel
) -> tuple[RunningCall, list[TensorBlockView]]:
    """A recv that has received its first block, and waits for the second."""
    into = _like([TensorBlockView(number, [bytes(nbytes)]) for number, nbytes in enumerate((3, 2 * _MIB, 5))])
    first = threading.Event()
    receiving = RunningCall(tasks, lambda: receiver.recv(into, lambda _: first.set()))
    await sender.send([TensorBlockView(0, [b"abc"])])
    await _is_set(first, "the first of several blocks does not land")
    return receiving, into


async def _is_set(event: threading.Event, otherwise: str) -> None:
    with within(PATIENCE, otherwise):
        while not event.is_set():  # noqa: ASYNC110 - set by a thread of the transport's
            await anyio.sleep(0.001)


async def _blocked_send(tasks: anyio.abc.TaskGroup, sender: Channel, receiver: Channel) -> RunningCall:
    """A send whose first block was received, and whose rest is larger than any buffer."""
    sending = RunningCall(tasks, lambda: sender.send([TensorBlockView(0, [b"abc"]), *[_large()] * 2]))
    await receiver.recv([TensorBlockView(0, [bytes(3)])])
    require(not sending.over, "a send of 64 MiB was over when 3 bytes had been received")
    return sending


async def _is_over(ended: Channel, peer: Channel) -> None:
    with raises(ChannelClosed, "send on a channel that ended"):
        await ended.send([])
    with raises(ChannelClosed, "recv on a channel that ended"):
        await ended.recv([])
    with raises(PeerLost, "the peer's recv on a channel that ended"):
        await peer.recv([_large()] * 2)


def _large() -> TensorBlockView:
    """A block that, together with a second one, is larger than all buffers in between."""
    return TensorBlockView.zeros(1, 32 * _MIB)


def _snapshot(blocks: Sequence[TensorBlockView]) -> list[bytes]:
    return [block.data for block in blocks]
