"""TRANSFER: blocks are requested, granted, and moved."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from netloader.core import messages as m
from netloader.core.plan import Ranges, expand, mask_of
from netloader.core.protocol import effects as f
from netloader.core.protocol.context import Context
from netloader.core.protocol.events import (
    BlocksGone,
    BlocksOffered,
    BlocksReady,
    BlocksReceived,
    BlocksSent,
    BlocksWanted,
    ChannelOpened,
)
from netloader.errors import LocalProtocolError, RemoteProtocolError

__all__ = [
    "TELLS_BLOCKS",
    "client_gone",
    "client_grant",
    "client_progress",
    "client_received",
    "client_wanted",
    "server_early_want",
    "server_gone",
    "server_offered_blocks",
    "server_offered_early",
    "server_open",
    "server_ready",
    "server_sent",
    "server_want",
]


TELLS_BLOCKS = 2
"""First version of the protocol in which a server tells its clients which blocks it has."""


def _check_ranges(ctx: Context, ranges: Ranges, what: str) -> None:
    """Check ranges of blocks that a peer sent.

    Raises:
        RemoteProtocolError: The ranges are empty, not ascending, overlap, or reach past the last block.
    """
    blocks = len(ctx.known().plan.blocks)
    last = 0
    for first, end in ranges:
        if not last <= first < end <= blocks:
            raise RemoteProtocolError(f"the peer's {what} has range {first}..{end}, there are {blocks} blocks")
        last = end
    if not ranges:
        raise RemoteProtocolError(f"the peer's {what} names no block")


def _checked(ctx: Context, ranges: Ranges, what: str) -> tuple[int, ...]:
    """Block numbers of ranges that a peer sent. Raises like :func:`_check_ranges`."""
    _check_ranges(ctx, ranges, what)
    return expand(ranges)


def _ask(ctx: Context, ranges: Ranges) -> tuple[int, ...]:
    numbers = _checked(ctx, ranges, "request")
    if not ctx.open_blocks.isdisjoint(numbers):
        raise RemoteProtocolError("the client requested a block that it is already waiting for")
    if len(ctx.open_blocks) + len(numbers) > ctx.server.options.max_open_blocks:
        raise RemoteProtocolError(f"the client requested more than {ctx.server.options.max_open_blocks} blocks at once")
    ctx.open_blocks.update(numbers)
    return numbers


def _server_timer(ctx: Context) -> f.SetTimer:
    """A client that has a turn must request blocks in time. While blocks move, the channel detects a stall.

    A client of a relay that has not named all blocks may have nothing to ask for, however long that takes.
    """
    return f.SetTimer(None if ctx.open_blocks or ctx.partial else ctx.timings().stall)


def _client_timer(ctx: Context) -> f.SetTimer:
    """The server must answer requests in time. While blocks move, the channel detects a stall."""
    return f.SetTimer(ctx.timings().stall if ctx.open_blocks else None)


_BlockEvent = BlocksReady | BlocksGone | BlocksSent | BlocksWanted | BlocksReceived


def _own(event: _BlockEvent, *, among: AbstractSet[int] | None = None, but: AbstractSet[int] = frozenset()) -> set[int]:
    """The blocks in an event of this side's driver.

    Raises:
        LocalProtocolError: A block is not in `among`, or is in `but`: a bug in the driver.
    """
    numbers = set(expand(event.ranges))
    stray = sorted(numbers & but if among is None else (numbers - among) | (numbers & but))
    if stray:
        raise LocalProtocolError(f"{type(event).__name__} is not legal for blocks {stray[:3]}")
    return numbers


def _in_parts(ranges: Ranges) -> list[Ranges]:
    """`ranges`, split into parts that fit into one message each."""
    return [ranges[i : i + m.MAX_RANGES] for i in range(0, len(ranges), m.MAX_RANGES)]


def server_early_want(ctx: Context, event: m.Want) -> Sequence[f.Effect]:
    """The client's end of the channel opened first: keep the request until the server's end is open."""
    if not ctx.transport:
        raise RemoteProtocolError("the client requested blocks before it agreed to a plan")
    _ask(ctx, event.ranges)
    ctx.early_wants.append(event.ranges)
    return []


def server_open(ctx: Context, event: ChannelOpened) -> Sequence[f.Effect]:
    """The server's end of the channel is open: answer early requests."""
    if not ctx.transport:
        raise LocalProtocolError("a channel opened before a transport was chosen")
    early, ctx.early_wants = ctx.early_wants, []
    return [*(f.CheckBlocks(ranges) for ranges in early), _server_timer(ctx)]


def server_want(ctx: Context, event: m.Want) -> Sequence[f.Effect]:
    """The client requests blocks."""
    _ask(ctx, event.ranges)
    return [f.CheckBlocks(event.ranges), _server_timer(ctx)]


def server_ready(ctx: Context, event: BlocksReady) -> Sequence[f.Effect]:
    """Blocks can be sent: grant them first, because the client posts receives for granted blocks only."""
    ctx.granted.update(_own(event, among=ctx.open_blocks, but=ctx.granted))
    return [*(f.Send(m.Grant(ranges=part)) for part in _in_parts(event.ranges)), f.SendBlocks(event.ranges)]


def server_gone(ctx: Context, event: BlocksGone) -> Sequence[f.Effect]:
    """Blocks can't be sent any more."""
    ctx.open_blocks.difference_update(_own(event, among=ctx.open_blocks, but=ctx.granted))
    reason, sources = m.wire_text(event.reason), m.wire_sources(event.sources)
    losses = (f.Send(m.Gone(ranges=part, reason=reason, sources=sources)) for part in _in_parts(event.ranges))
    return [*losses, _server_timer(ctx)]


def server_offered_early(ctx: Context, event: BlocksOffered) -> Sequence[f.Effect]:
    """The same before this end of the channel is open."""
    if ctx.protocol < TELLS_BLOCKS:
        raise LocalProtocolError("a client of protocol 1 can't be told which blocks there are")
    ctx.named |= mask_of(event.has)
    ctx.partial = ctx.partial and ctx.named.bit_count() < len(ctx.known().plan.blocks)
    return [
        *(f.Send(m.Progress(has=part)) for part in _in_parts(event.has)),
        *(f.Send(m.Progress(sent=part)) for part in _in_parts(event.sent)),
    ]


def server_offered_blocks(ctx: Context, event: BlocksOffered) -> Sequence[f.Effect]:
    """This server has more blocks, or sent some to others: tell the client. With all named, it must request in time."""
    before = ctx.partial
    told = server_offered_early(ctx, event)
    return [*told, _server_timer(ctx)] if before and not ctx.partial else told


def server_sent(ctx: Context, event: BlocksSent) -> Sequence[f.Effect]:
    """Blocks were sent."""
    numbers = _own(event, among=ctx.granted)
    ctx.open_blocks.difference_update(numbers)
    ctx.granted.difference_update(numbers)
    return [_server_timer(ctx)]


def client_wanted(ctx: Context, event: BlocksWanted) -> Sequence[f.Effect]:
    """Blocks were assigned to this session: request them."""
    ctx.open_blocks.update(_own(event, but=ctx.open_blocks | ctx.granted))
    return [*(f.Send(m.Want(ranges=part)) for part in _in_parts(event.ranges)), _client_timer(ctx)]


def _answered(ctx: Context, ranges: Ranges, what: str) -> tuple[int, ...]:
    numbers = _checked(ctx, ranges, what)
    if not ctx.open_blocks.issuperset(numbers):
        stray = sorted(set(numbers) - ctx.open_blocks)[:3]
        raise RemoteProtocolError(f"the server's {what} names blocks that were not requested: {stray}")
    ctx.open_blocks.difference_update(numbers)
    return numbers


def client_grant(ctx: Context, event: m.Grant) -> Sequence[f.Effect]:
    """The server will send these blocks next: only now is it safe to post receives."""
    ctx.granted.update(_answered(ctx, event.ranges, "grant"))
    return [f.ReceiveBlocks(event.ranges), _client_timer(ctx)]


def client_progress(ctx: Context, event: m.Progress) -> Sequence[f.Effect]:
    """The server has more blocks, or sends some to others.

    Each message costs the pull more than it costs its sender, so it has to name a block that was not named before.
    """
    if ctx.announcement is None:
        raise RemoteProtocolError("the server sent Progress before its announcement was examined")
    for ranges, what in ((event.has, "progress"), (event.sent, "note of what it sent")):
        if ranges:
            _check_ranges(ctx, ranges, what)
    has, sent = ctx.named | mask_of(event.has), ctx.named_sent | mask_of(event.sent)
    if (has, sent) == (ctx.named, ctx.named_sent):
        raise RemoteProtocolError("the server sent Progress that names no block that it had not named before")
    ctx.named, ctx.named_sent = has, sent
    return [f.NoteBlocks(event.has, event.sent)]


def client_gone(ctx: Context, event: m.Gone) -> Sequence[f.Effect]:
    """The server can't send these blocks."""
    _answered(ctx, event.ranges, "loss")
    return [f.ReturnBlocks(event.ranges, event.reason, event.sources), _client_timer(ctx), f.AskForWork()]


def client_received(ctx: Context, event: BlocksReceived) -> Sequence[f.Effect]:
    """Blocks arrived and were verified."""
    ctx.granted.difference_update(_own(event, among=ctx.granted))
    return [f.AskForWork()]
