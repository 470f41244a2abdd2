"""The driver of a session: it carries out the effects of the session's state machine over real I/O.

Feeding an event is synchronous and never blocks. The state machine returns effects for it. The driver carries out short
effects at once, and starts a task for each long one; the result of the task is fed as one event. Reader, writer, timer
and these tasks run in one task group, which ends with the session.
"""

from __future__ import annotations

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

from netloader.core.messages import ClientMessage, Ending, ServerMessage
from netloader.core.protocol import FINAL, Session, Side, State
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from netloader.core.protocol.announcement import examine
from netloader.errors import (
    LocalProtocolError,
    NetloaderError,
    PeerLost,
    RemoteProtocolError,
    TransportError,
    shortage,
    unexpected,
)
from netloader.observe.base import Observers
from netloader.observe.events import PhaseEnded, TransportChosen
from netloader.session.closing import LentMemory, drop_tracebacks
from netloader.session.connection import ControlConnection
from netloader.session.notes import SessionNotes
from netloader.session.off_loop import examined_quickly
from netloader.session.outbox import Outbox
from netloader.session.phase_clock import PhaseClock
from netloader.session.setup_mailbox import SetupMailbox
from netloader.transports.base import Channel, Setup

__all__ = ["ChannelCall", "SessionDriver"]

ChannelCall = Callable[[], Awaitable[Callable[[], None]]]
"""A call of a channel. It returns a function that accounts for it, to be called after those of all earlier calls."""

M = TypeVar("M", bound=ClientMessage | ServerMessage)
R = TypeVar("R")

_log = logging.getLogger("netloader")

_FAREWELL = 0.5
"""Seconds that sending the last messages of a session may take."""

_ABANDONED_FAREWELL = 0.05
"""Seconds that sending the last message of an abandoned session may take."""

_EXPLANATION = 0.25
"""Seconds to wait for the message with which a peer explains why it closed the channel."""


class SessionDriver(Generic[M]):
    """Drives one session over one control connection. Subclasses carry out the effects of their side.

    Args:
        session: A fresh session.
        connection: Its control connection. The driver owns it from now on.
        device: Device of the blocks, as torch names it.
        label: Name of the session in the log.
        number: The session's number, for observers.
        peer: The peer's address, for observers.
        began: When connecting began, by the monotonic clock; None means now.
        observers: Receive the chosen transport and the duration of each phase.

    Attributes:
        lent: The memory that is lent to the channel. After the session it says whether the channel may still use it.
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
        self.lent = LentMemory(label)
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
        self._outbox = Outbox(
            connection,
            start=self._start_writing,
            lost=self._connection_failed,
            failed=lambda error: self.feed(_as_event(error)),
        )
        self._feeding = False
        self._deadline: float | None = None
        self._deadline_moved = anyio.Event()
        self._watch_until = math.inf
        self._closing = anyio.Event()
        self._farewell_seconds = _FAREWELL
        self._farewell_until = math.inf  # time of the event loop after which the session does not wait for the peer
        self._farewell_scope = anyio.CancelScope()
        self._notes = SessionNotes(label)
        self._tasks: TaskGroup | None = None

    # --- life -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Drive the session to its end. On cancellation the peer is sent a last message.

        Raises nothing that a peer can cause. ``session.error`` holds the reason of a failure afterwards.
        """
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                tasks.start_soon(self._read)
                tasks.start_soon(self._watch_timer)
                self.feed(e.Connected(os.urandom(16)))
                try:
                    await self._closing.wait()
                except anyio.get_cancelled_exc_class():
                    self.feed(self.cancellation())
                    raise
                finally:
                    latest = min(anyio.current_time() + self._farewell_seconds, self._farewell_until)
                    self._outbox.hurry(self._farewell_seconds, latest)
                tasks.cancel_scope.cancel()
        finally:
            self._signals.close()
            with anyio.CancelScope(shield=True):  # each of these has a deadline of its own
                await self._send_farewell()
                await self._close_channel()
                await self._connection.aclose()
            self._phase_over(self.session.state)
            if self.session.error is not None:
                _log.debug("%s: failed", self.label, exc_info=self.session.error)
                drop_tracebacks(self.session.error)

    def abandon(self, reason: str, code: Ending = "internal") -> None:
        """End the session with a very short deadline for the last message. Also shortens an ending in progress."""
        self._farewell_seconds = _ABANDONED_FAREWELL
        self.feed(e.Cancelled(reason, code))
        self._farewell_scope.deadline = min(self._farewell_scope.deadline, anyio.current_time() + _ABANDONED_FAREWELL)

    @property
    def seconds(self) -> float:
        """Seconds from the start of connecting to the last change of state."""
        return sum(self.clock.seconds().values())

    def limit_farewell(self, deadline: float) -> None:
        """Do not wait for the peer after `deadline`, a time of the event loop, when the session ends."""
        self._farewell_until = deadline
        self._farewell_scope.deadline = min(self._farewell_scope.deadline, deadline)

    async def _send_farewell(self) -> None:
        """Flush the outbox, then wait for FIN: closing with unread input sends RST and drops our last message."""
        with self._farewell_scope:
            self._farewell_scope.deadline = min(anyio.current_time() + self._farewell_seconds, self._farewell_until)
            try:
                await self._outbox.flush()
            except NetloaderError as error:
                _log.debug("%s: the last messages could not be sent: %s", self.label, error)

    def feed(self, event: e.Event) -> None:
        """Give the session one event and carry out the effects that it returns."""
        self._events.append(event)
        if self._feeding:  # called by an effect that has its result at once
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
            self.state_changed(after)
        for effect in effects:
            try:
                self._perform(effect)
            except NetloaderError as error:
                self._events.append(_as_event(error))

    def _phase_over(self, after: State) -> None:
        before, seconds = self.clock.enter(after)
        if before not in FINAL:
            phase = "connect" if before is State.LISTEN else before.value
            self._observe(PhaseEnded(self.session.side.value, self.number, self.peer, phase, seconds))

    # --- effects ----------------------------------------------------------------------------------------------------

    def _perform(self, effect: f.Effect) -> None:
        match effect:
            case f.Send(message):
                self._outbox.put(message)
            case f.Authenticate(sending, receiving):
                self._outbox.authenticate(sending)
                self._connection.authenticate(receiving)
            case f.SetTimer(seconds):
                self._set_timer(seconds)
            case f.Note(text):
                self._notes.add(text)
            case f.NoteChain(node, chain):
                self.chain(node, chain)
            case f.NoteQueued(position, reason):
                self.queued(position, reason)
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
        """Check an announcement: at once, or in a thread if it has so many tensors that it would block the event loop.

        The thread only computes, so a session that ends does not wait for it.
        """
        if examined_quickly(question.announce, question.terms.manifest):
            self.feed(e.Examined(examine(question)))
            return
        work = partial(anyio.to_thread.run_sync, examine, question, abandon_on_cancel=True)
        self.spawn(work, e.Examined)

    def _start_writing(self) -> bool:
        if self._tasks is None:
            return False
        self._tasks.start_soon(self._outbox.write)
        return True

    def perform(self, effect: f.Effect) -> None:
        """Carry out an effect that only this side has.

        Raises:
            LocalProtocolError: This side has no such effect.
        """
        raise LocalProtocolError(f"{self.label} cannot carry out {type(effect).__name__}")

    def chain(self, node: str, relays: tuple[str, ...]) -> None:
        """Called when the peer names the relays that its blocks come through. Does nothing by default."""

    def queued(self, position: int, reason: str) -> None:
        """Called when the server queues this session, behind `position` clients. Does nothing by default."""

    def cancellation(self) -> e.Cancelled:
        """The event to feed when :meth:`run` is cancelled; the peer is sent its reason."""
        return e.Cancelled("the client gave up")

    def state_changed(self, after: State) -> None:
        """Called after each change of state."""

    def spawn(self, work: Callable[[], Awaitable[R]], result: Callable[[R], e.Event | None]) -> None:
        """Run `work` as a task of the session and feed the event that `result` returns for its outcome.

        If `work` raises, the error is fed as a failure of the channel or of the session.
        """
        if self._tasks is None:
            raise LocalProtocolError("the session is not running")
        self._tasks.start_soon(self._run_and_feed, work, result)

    async def _run_and_feed(self, work: Callable[[], Awaitable[R]], result: Callable[[R], e.Event | None]) -> None:
        try:
            event = result(await work())
        except anyio.get_cancelled_exc_class() as error:
            drop_tracebacks(error)
            raise
        except Exception as error:  # noqa: BLE001 - see _failed
            event = await self._failed(error)
        if event is not None:
            self.feed(event)

    async def _failed(self, error: Exception) -> e.Event:
        """The event for an error of a task. An unexpected error ends the session and nothing else."""
        self.lent.note(error)
        if isinstance(error, PeerLost):
            # The peer may explain why on the control connection. That is the better reason; it may arrive a bit later.
            with anyio.move_on_after(_EXPLANATION):
                await self._closing.wait()
        if isinstance(error, NetloaderError):
            return _as_event(error)
        if scarce := shortage(error):
            return _as_event(scarce)
        _log.error("%s: unexpected error, the session ends", self.label, exc_info=error)
        return _as_event(unexpected(error, "netloader or in a transport"))

    # --- channel ----------------------------------------------------------------------------------------------------

    def setup(self, peer_facts: dict[str, str]) -> Setup:
        """The facts about this session that a transport needs."""
        return Setup(
            device=self._device,
            local_host=self._connection.local_host,
            peer_host=self._connection.peer_host,
            peer_facts=peer_facts,
            signals=self._signals,
            timeout=self.session.timings.plan,
            stall=self.session.timings.stall,
            data_key=self.session.data_key,
        )

    async def open_channel(self, make: Callable[[], Awaitable[Channel]]) -> e.Event | None:
        """Open the channel with `make`. Returns None when the session closed it meanwhile."""
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

    async def make_calls(self, following: Callable[[], Awaitable[ChannelCall | None]]) -> None:
        """Make calls of the channel until one fails or there are no more; at most as many at once as its depth.

        Args:
            following: Waits for the next call and returns it; None when no more will come. Used when the channel can
                take another call.
        """
        slots = anyio.Semaphore(self.channel().depth)
        last = anyio.Event()
        last.set()
        async with anyio.create_task_group() as tasks:
            while True:
                await slots.acquire()
                try:
                    call = await following()
                except Exception as error:  # noqa: BLE001 - see _failed
                    call = partial(_raise, error)
                if call is None:
                    return
                before, last = last, anyio.Event()
                # Tasks start in this order, so the channel receives its calls in this order.
                tasks.start_soon(self._make_call, call, before, last, slots, tasks.cancel_scope)

    async def _make_call(
        self, call: ChannelCall, prior: anyio.Event, over: anyio.Event, slots: anyio.Semaphore, scope: anyio.CancelScope
    ) -> None:
        """Make one call. Account for it after all earlier calls are accounted for."""
        try:
            account = await call()
            await prior.wait()
            account()
        except anyio.get_cancelled_exc_class() as error:
            drop_tracebacks(error)
            raise
        except Exception as error:  # noqa: BLE001 - see _failed
            event = await self._failed(error)
            await prior.wait()  # if an earlier call failed too, its error is the cause, and is fed first
            self.feed(event)
            scope.cancel()
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
                self._connection_failed(error.message)
                return
            if self.session.state is State.LISTEN:
                self.session.greeted(self._connection.take_greeting())
            for message in messages:
                self.feed(message)
                await self._outbox.has_room()
                await anyio.lowlevel.checkpoint()  # after each message: thousands of short ones may come at once

    def _connection_failed(self, reason: str) -> None:
        self._outbox.lose()
        self.feed(e.ConnectionLost(reason))

    def _set_timer(self, seconds: float | None) -> None:
        self._deadline = None if seconds is None else time.monotonic() + seconds
        # A deadline that moves later needs no wake-up: the timer wakes at the old one and reads the new one then.
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


async def _raise(error: Exception) -> NoReturn:
    """A channel call that fails with `error`."""
    raise error


def _as_event(error: NetloaderError) -> e.Event:
    return e.WorkFailed(error) if isinstance(error, TransportError) else e.Failed(error)
