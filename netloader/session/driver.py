"""What server and client sessions have in common: carrying out the effects of a session over real I/O.

Feeding an event is synchronous and never blocks: the session turns it into effects, quick ones are done at once, slow
ones become tasks whose result comes back as one event. Reader, writer, timer and those tasks live in one task group,
which ends with the session.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Generic, NoReturn, TypeVar

import anyio
from anyio.abc import TaskGroup

from netloader.codecs.frames import encode_frame
from netloader.core.messages import Announce, ClientMessage, Ending, ServerMessage
from netloader.core.protocol import FINAL, Session, Side, State
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from netloader.core.protocol.announcement import examine
from netloader.errors import LocalProtocolError, NetloaderError, PeerLost, RemoteProtocolError, TransportError
from netloader.observe.base import Observers
from netloader.observe.events import PhaseEnded, TransportChosen
from netloader.session.closing import Lent, forget_frames
from netloader.session.connection import ControlConnection
from netloader.session.off_loop import FEW_TENSORS, framed
from netloader.session.phase_clock import PhaseClock
from netloader.session.setup_mailbox import SetupMailbox
from netloader.transports.base import Channel, Setup

__all__ = ["Move", "SessionDriver"]

Move = Callable[[], Awaitable[Callable[[], None]]]
"""A call of a channel. Returns what has to be done about it, once the calls made before it are over."""

M = TypeVar("M", bound=ClientMessage | ServerMessage)
R = TypeVar("R")

_log = logging.getLogger("netloader")

_LINGER = 0.5
"""Seconds that the last messages of a session may take to leave."""

_PARTING = 0.05
"""Seconds that the last message of an abandoned session may take to leave."""

_OUTBOX_LIMIT = 256
"""Messages that may wait to be sent before this side stops reading: a peer that does not read gets no more done."""

_SEND_LIMIT = 30.0
"""Seconds that one control message may take to leave."""

_EXPLAINING = 0.25
"""Seconds that a peer which closed the channel has to say why."""

_SHOWN_ERROR = 500


class SessionDriver(Generic[M]):
    """Drives one session over one control connection. Subclasses carry out the effects of their side.

    Args:
        session: A fresh session.
        connection: Its control connection; owned from here on.
        device: Where blocks live.
        label: Who this is, for the log.
        number: The session's number, for observers.
        peer: The peer's address, for observers.
        began: When connecting began; None: now.
        observers: Told which transport is used, and how long each phase took.

    Attributes:
        lent: The memory that is lent to the channel; once the session is over, whether it can be had back.
    """

    def __init__(
        self,
        session: Session,
        connection: ControlConnection[M],
        *,
        device: str,
        label: str,
        number: int = 0,
        peer: str = "",
        began: float | None = None,
        observers: Observers | None = None,
    ) -> None:
        self.session = session
        self.label = label
        self.lent = Lent(label)
        self.number = number
        self.peer = peer
        self.clock = PhaseClock(time.monotonic() if began is None else began)
        self._observe = Observers() if observers is None else observers
        self._connection = connection
        self._device = device
        self._signals = SetupMailbox(self.feed)
        self._channel: Channel | None = None
        self._channel_scope = anyio.CancelScope()
        self._events: deque[e.Event] = deque()
        self._feeding = False
        self._outbox: deque[bytes | Announce] = deque()
        self._outbox_filled = asyncio.Event()
        self._outbox_shrank = anyio.Event()
        self._deadline: float | None = None
        self._deadline_moved = anyio.Event()
        self._watch_until = math.inf
        self._closing = anyio.Event()
        self._connection_lost = False
        self._linger = _LINGER
        self._hurry = math.inf  # time of the loop after which nobody waits for the peer
        self._send_scope = anyio.CancelScope()
        self._last_words = anyio.CancelScope()
        self._noted = ""
        self._tasks: TaskGroup | None = None

    # --- life -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Drive the session until it has ended. Cancelling this ends the session with a goodbye.

        Never raises for anything a peer can cause; see ``session.error`` afterwards.
        """
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                tasks.start_soon(self._read)
                tasks.start_soon(self._write)
                tasks.start_soon(self._watch_timer)
                self.feed(e.Connected(os.urandom(16)))
                try:
                    await self._closing.wait()
                except anyio.get_cancelled_exc_class():
                    self.feed(self.gave_up())
                    raise
                finally:
                    latest = min(anyio.current_time() + self._linger, self._hurry)
                    self._send_scope.deadline = min(self._send_scope.deadline, latest)
                tasks.cancel_scope.cancel()
        finally:
            self._signals.close()
            with anyio.CancelScope(shield=True):  # each of these has a deadline of its own
                await self._say_last_words()
                await self._close_channel()
                await self._connection.aclose()
            self._phase_over(self.session.state)
            if self.session.error is not None:
                _log.debug("%s: failed", self.label, exc_info=self.session.error)
                forget_frames(self.session.error)

    def abandon(self, reason: str, code: Ending = "internal") -> None:
        """End the session, also one that is ending already, and hardly wait for the peer to hear of it."""
        self._linger = _PARTING
        self.feed(e.Cancelled(reason, code))
        self._last_words.deadline = min(self._last_words.deadline, anyio.current_time() + _PARTING)

    @property
    def seconds(self) -> float:
        """How long the session took, connecting included, up to its last change of state."""
        return sum(self.clock.seconds().values())

    def hurry(self, deadline: float) -> None:
        """When the session ends, do not wait for the peer to hear of it after `deadline`, a time of the event loop."""
        self._hurry = deadline
        self._last_words.deadline = min(self._last_words.deadline, deadline)

    async def _say_last_words(self) -> None:
        """Send what is left, and see the peer close: closing with unread bytes would destroy what we said."""
        with self._last_words:
            self._last_words.deadline = min(anyio.current_time() + self._linger, self._hurry)
            try:
                while self._outbox and not self._connection_lost:
                    await self._connection.send(await framed(self._outbox.popleft()))
                if not self._connection_lost:
                    await self._connection.finish()
            except NetloaderError as error:
                _log.debug("%s: last words were not heard: %s", self.label, error)

    def feed(self, event: e.Event) -> None:
        """Give the session one event and carry out what follows from it."""
        self._events.append(event)
        if self._feeding:  # an effect was quick enough to have its result at once
            return
        self._feeding = True
        try:
            while self._events:
                self._step(self._events.popleft())
        finally:
            self._feeding = False

    def _step(self, event: e.Event) -> None:
        before = self.session.state
        effects = self.session.handle(event)
        after = self.session.state
        if after is not before:
            self._phase_over(after)
            _log.debug("%s: %s", self.label, after.name)
            if after is State.TRANSFER:
                side, transport = self.session.side.value, self.session.transport
                self._observe(TransportChosen(side, self.number, self.peer, transport))
            self.moved(after)
        for effect in effects:
            try:
                self._perform(effect)
            except NetloaderError as error:
                self._events.append(_as_event(error))

    def _phase_over(self, after: State) -> None:
        before, seconds = self.clock.move(after)
        if before not in FINAL:
            phase = "connect" if before is State.LISTEN else before.value
            self._observe(PhaseEnded(self.session.side.value, self.number, self.peer, phase, seconds))

    # --- effects ----------------------------------------------------------------------------------------------------

    def _perform(self, effect: f.Effect) -> None:
        match effect:
            case f.Send(Announce() as message) if message.manifest and len(message.manifest.tensors) > FEW_TENSORS:
                self._say(message)
            case f.Send(message):
                self._say(encode_frame(message))
            case f.SetTimer(seconds):
                self._set_timer(seconds)
            case f.Note(text):
                _log.log(logging.DEBUG if text == self._noted else logging.INFO, "%s: %s", self.label, text)
                self._noted = text
            case f.NoteChain(node, chain):
                self.chain(node, chain)
            case f.NoteQueued():
                self.queued()
            case f.Examine():
                self._examine(effect)
            case f.DeliverSignal(data):
                self._signals.deliver(data)
            case f.CloseChannel():
                self.spawn(self._close_channel, lambda _: e.ChannelDown())
            case f.Close():
                self._closing.set()
            case _:
                self.perform(effect)

    def _examine(self, question: f.Examine) -> None:
        """Check an announcement: at once, or in a thread where it has so many tensors that the loop would stand still.

        The thread only computes: when the session ends meanwhile it is not waited for.
        """
        manifest = question.announce.manifest or question.terms.manifest
        if manifest is None or len(manifest.tensors) <= FEW_TENSORS:
            self.feed(e.Examined(examine(question)))
            return
        work = partial(anyio.to_thread.run_sync, examine, question, abandon_on_cancel=True)
        self.spawn(work, e.Examined)

    def _say(self, frame: bytes | Announce) -> None:
        """Send something after all that was said before; an announcement that is long to encode as it is."""
        self._outbox.append(frame)
        self._outbox_filled.set()

    def perform(self, effect: f.Effect) -> None:
        """Carry out an effect of this side only.

        Raises:
            LocalProtocolError: This side has no such effect.
        """
        raise LocalProtocolError(f"{self.label} cannot carry out {type(effect).__name__}")

    def chain(self, node: str, relays: tuple[str, ...]) -> None:
        """Called when the peer tells which relays its blocks come through; nothing to be done for a plain pull."""

    def queued(self) -> None:
        """Called when the server lets this session wait for its turn."""

    def gave_up(self) -> e.Cancelled:
        """What is told to the peer when :meth:`run` is cancelled."""
        return e.Cancelled("the client gave up")

    def moved(self, after: State) -> None:
        """Called after each change of state."""

    def spawn(self, work: Callable[[], Awaitable[R]], result: Callable[[R], e.Event | None]) -> None:
        """Run `work` as a task of the session and feed what `result` makes of its outcome.

        An error that it raises is fed as a failure of the channel, or of the session.
        """
        if self._tasks is None:
            raise LocalProtocolError("the session is not running")
        self._tasks.start_soon(self._run_and_feed, work, result)

    async def _run_and_feed(self, work: Callable[[], Awaitable[R]], result: Callable[[R], e.Event | None]) -> None:
        try:
            event = result(await work())
        except anyio.get_cancelled_exc_class() as error:
            forget_frames(error)
            raise
        except Exception as error:  # noqa: BLE001 - see _failed
            event = await self._failed(error)
        if event is not None:
            self.feed(event)

    async def _failed(self, error: Exception) -> e.Event:
        """The event for an error of a task. One that nobody expected costs the session too, and nothing else."""
        self.lent.note(error)
        if isinstance(error, PeerLost):
            # The peer may have said why on the control connection; that is the better reason, and it takes a moment.
            with anyio.move_on_after(_EXPLAINING):
                await self._closing.wait()
        if isinstance(error, NetloaderError):
            return _as_event(error)
        _log.error("%s: unexpected error, the session ends", self.label, exc_info=error)
        explained = NetloaderError(
            f"unexpected {type(error).__name__}: {error}"[:_SHOWN_ERROR],
            hint="this is a bug in netloader or in a transport: the log has the details",
        )
        explained.__cause__ = error
        return _as_event(explained)

    # --- channel ----------------------------------------------------------------------------------------------------

    def setup(self, peer_facts: dict[str, str]) -> Setup:
        """What a transport is told about this session."""
        return Setup(
            device=self._device,
            local_host=self._connection.local_host,
            peer_host=self._connection.peer_host,
            peer_facts=peer_facts,
            signals=self._signals,
            timeout=self.session.timings.plan,
            stall=self.session.timings.stall,
        )

    async def open_channel(self, make: Callable[[], Awaitable[Channel]]) -> e.Event | None:
        """Open the channel with `make`, unless the session closes it first."""
        channel: Channel | None = None
        with self._channel_scope:
            channel = await make()
        if channel is None:
            return None
        if self._channel_scope.cancel_called or self._closing.is_set():
            await self._close(channel)
            return None
        self._channel = channel
        return e.ChannelOpened()

    def channel(self) -> Channel:
        """The open channel.

        Raises:
            LocalProtocolError: There is none.
        """
        if self._channel is None:
            raise LocalProtocolError("no channel is open")
        return self._channel

    async def move_blocks(self, following: Callable[[], Awaitable[Move | None]]) -> None:
        """Make calls of the channel, as many at a time as it takes, until one fails or there are no more.

        Args:
            following: The next call; None when there is none and will be none. Asked for when the channel takes one.
        """
        slots = anyio.Semaphore(self.channel().depth)
        last = anyio.Event()
        last.set()
        async with anyio.create_task_group() as tasks:
            while True:
                await slots.acquire()
                try:
                    move = await following()
                except Exception as error:  # noqa: BLE001 - see _failed
                    move = partial(_failing, error)
                if move is None:
                    return
                before, last = last, anyio.Event()
                # Tasks take their first steps in this order, and with it the channel gets its calls in it.
                tasks.start_soon(self._move, move, before, last, slots, tasks.cancel_scope)

    async def _move(
        self, move: Move, before: anyio.Event, over: anyio.Event, slots: anyio.Semaphore, all_moves: anyio.CancelScope
    ) -> None:
        """Make one call, and account for it once those before it are accounted for."""
        try:
            account = await move()
            await before.wait()
            account()
        except anyio.get_cancelled_exc_class() as error:
            forget_frames(error)
            raise
        except Exception as error:  # noqa: BLE001 - see _failed
            event = await self._failed(error)
            await before.wait()  # when an earlier one failed, too, that is the reason for this
            self.feed(event)
            all_moves.cancel()
        else:
            over.set()
            slots.release()

    async def _close_channel(self) -> None:
        self._channel_scope.cancel()
        channel, self._channel = self._channel, None
        if channel is not None:
            await self._close(channel)

    async def _close(self, channel: Channel) -> None:
        client = self.session.side is Side.CLIENT
        await self.lent.close(channel, f"{self.session.transport} channel", writes=client)

    # --- tasks ------------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        while self.session.state not in FINAL:
            try:
                messages = await self._connection.receive()
            except RemoteProtocolError as error:
                self.feed(e.Failed(error))
                return
            except PeerLost as error:
                self._lose(error.message)
                return
            for message in messages:
                self.feed(message)
                while len(self._outbox) > _OUTBOX_LIMIT:
                    await self._outbox_shrank.wait()
            await anyio.lowlevel.checkpoint()

    async def _write(self) -> None:
        """Send what is in the outbox; the only task that does while the session goes on."""
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            while self._outbox:
                try:
                    frame = await framed(self._outbox.popleft())
                except LocalProtocolError as error:
                    self.feed(_as_event(error))
                    continue
                if not await self._write_frame(frame):
                    return
                changed, self._outbox_shrank = self._outbox_shrank, anyio.Event()
                changed.set()

    async def _write_frame(self, frame: bytes) -> bool:
        """Send one frame; False when the connection is lost.

        Shielded: what is being said when the session closes is said to its end, or the peer could not make sense of
        the last words after it. Closing moves the deadline nearer.
        """
        deadline = anyio.current_time() + (self._linger if self._closing.is_set() else _SEND_LIMIT)
        with anyio.CancelScope(shield=True, deadline=deadline) as self._send_scope:
            try:
                await self._connection.send(frame)
            except PeerLost as error:
                self._lose(error.message)
                return False
        if self._send_scope.cancelled_caught:
            self._lose("the peer does not read")
        return not self._send_scope.cancelled_caught

    def _lose(self, reason: str) -> None:
        self._connection_lost = True
        self._outbox.clear()
        self.feed(e.ConnectionLost(reason))

    def _set_timer(self, seconds: float | None) -> None:
        self._deadline = None if seconds is None else time.monotonic() + seconds
        # Most deadlines are moved away: the watch finds that out when it wakes for the old one.
        if self._deadline is not None and self._deadline < self._watch_until:
            self._deadline_moved.set()

    async def _watch_timer(self) -> None:
        while True:
            self._deadline_moved = anyio.Event()
            self._watch_until = math.inf if self._deadline is None else self._deadline
            left = self._watch_until - time.monotonic()
            if left <= 0:
                self._deadline = None
                self.feed(e.TimedOut())
                continue
            with anyio.move_on_after(left):
                await self._deadline_moved.wait()


async def _failing(error: Exception) -> NoReturn:
    """Work that fails with `error`."""
    raise error


def _as_event(error: NetloaderError) -> e.Event:
    return e.WorkFailed(error) if isinstance(error, TransportError) else e.Failed(error)
