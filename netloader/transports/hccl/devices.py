"""What all HCCL links of one process share, by device: turns, memory, and the time in which nothing may change.

A collective library of a device is shared by everything that runs on it, the engine's own communicators included, so
this account is kept once per process: the second sanctioned exception to "no global state", beside the server handle
of a vLLM worker (docs/decisions/0011-hccl-turns.md, 0013-hccl-windows.md).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from netloader.errors import PeerLost, RefusedError, TransferTimeout

__all__ = ["Device", "TurnLock", "blocking_wait", "device_of", "hold_still", "move_again"]

BLOCKING_WAIT = "TORCH_HCCL_BLOCKING_WAIT"

_LOOK = 0.02
"""Seconds between two looks whether whoever waits for a turn has given up."""

_FREEING = 30.0
"""Seconds that freeing a group which had to wait for :func:`move_again` may take before we say so."""

_log = logging.getLogger(__name__)
_environment = threading.Lock()
_registry = threading.Lock()
_devices: dict[str, Device] = {}


class TurnLock:
    """A lock whose waiters get it in the order in which they came, and may give up."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    def take(self, who: object, seconds: float, given_up: Callable[[], bool] = lambda: False) -> None:
        """Wait for the turn.

        Args:
            who: Whose it will be; not in line already.
            seconds: How long to wait at most.
            given_up: Asked now and then whether to go on waiting. Any thread, must not block.

        Raises:
            TransferTimeout: It did not come in time.
            PeerLost: `given_up`.
        """
        until = time.monotonic() + seconds
        with self._changed:
            self._line.append(who)
            try:
                while self._line[0] is not who:
                    self._changed.wait(_LOOK)
                    if given_up():
                        raise PeerLost("the wait for the device's turn was given up")
                    if time.monotonic() > until:
                        raise TransferTimeout(
                            f"{len(self._line) - 1} other links of this device were before this one for {seconds:g} s",
                            hint="serve fewer clients at once (MAX_CLIENTS)",
                        )
            except BaseException:
                self._line.remove(who)
                self._changed.notify_all()
                raise

    def give(self, who: object) -> None:
        """End the turn of `who`; does nothing when it has none."""
        with self._changed:
            if self._line and self._line[0] is who:
                self._line.popleft()
                self._changed.notify_all()


@dataclass
class Device:
    """One device, as far as this process uses HCCL on it.

    Attributes:
        name: As torch names it (``npu:3``).
        turns: Whose turn it is: to make a communicator, or to send or receive a window.
    """

    name: str
    turns: TurnLock = field(default_factory=TurnLock)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _taken: dict[int, int] = field(default_factory=dict)
    _still: tuple[str, float, float] | None = None
    _parked: list[Callable[[], object]] = field(default_factory=list)
    _kept: list[tuple[Any, Any]] = field(default_factory=list)

    def opened(self, group: object, nbytes: int) -> None:
        """Count a communicator and its device memory."""
        with self._lock:
            self._taken[id(group)] = nbytes
            count, total = len(self._taken), sum(self._taken.values())
        _log.info(
            "HCCL on %s: a communicator for weights takes %.0f MiB of device memory (%d open, %.0f MiB)",
            self.name,
            nbytes / (1 << 20),
            count,
            total / (1 << 20),
        )

    def closed(self, group: object) -> None:
        """A communicator is gone, or as good as gone."""
        with self._lock:
            self._taken.pop(id(group), None)

    def usage(self) -> tuple[int, int]:
        """Communicators that are open, and the bytes of device memory that they take."""
        with self._lock:
            return len(self._taken), sum(self._taken.values())

    def check_may_open(self) -> None:
        """See whether a communicator may be made now.

        Raises:
            RefusedError: Not now; it says when to ask again.
        """
        with self._lock:
            still = self._still
        if still is not None and time.monotonic() < still[2]:
            reason, retry_after, _ = still
            raise RefusedError(
                "busy",
                f"no HCCL group can be made on {self.name} now: {reason}",
                hint="it is over soon: set WAIT on the client",
                retry_after=retry_after,
            )

    def close_when_allowed(self, close: Callable[[], object]) -> None:
        """Call `close`: now, or once :func:`move_again` allows it."""
        with self._lock:
            if self._still is not None:
                self._parked.append(close)
                return
        close()

    def keep(self, work: Any, tensor: Any) -> None:
        """Keep memory that an operation may still write to: it never goes back to the allocator before that is over."""
        with self._lock:
            self._kept = [(w, t) for w, t in self._kept if not w.is_completed()]
            self._kept.append((work, tensor))
            nbytes = sum(t.numel() for _, t in self._kept)
        _log.warning(
            "HCCL on %s: %d bytes of staging memory are kept: a broken group may still write", self.name, nbytes
        )

    def _be_still(self, reason: str, retry_after: float, longest: float) -> None:
        with self._lock:
            self._still = (reason, retry_after, time.monotonic() + longest)

    def _move(self) -> list[Callable[[], object]]:
        with self._lock:
            self._still = None
            parked, self._parked = self._parked, []
        return parked


def device_of(name: str) -> Device:
    """The account of a device; the same object for all links of this process."""
    with _registry:
        return _devices.setdefault(name, Device(name))


def hold_still(device: str, reason: str, retry_after: float, wait: float = 60.0, longest: float = float("inf")) -> None:
    """From now on make and free no communicator on `device`; clients get "busy" and are told when to ask again.

    Waits for one that is being made at the moment, or for a window that is being moved. Not for an event loop's thread.

    For the time in which somebody measures its memory: call it when vLLM's ``load_model`` ends, and
    :func:`move_again` once its memory profiling is over. Transfers that run go on.

    Args:
        device: As torch names it (``npu:3``).
        reason: Told to clients.
        retry_after: Seconds after which they may ask again.
        wait: Seconds to wait at most.
        longest: Seconds after which groups are made again although nobody said so.

    Raises:
        TransferTimeout: The device was in use all the time; no new group is made nevertheless.
    """
    account = device_of(device)
    account._be_still(reason, retry_after, longest)  # noqa: SLF001 - the device's own module
    who = object()
    account.turns.take(who, wait)
    account.turns.give(who)


def move_again(device: str) -> None:
    """End :func:`hold_still`; frees what was to be closed meanwhile. Does nothing where nothing was held."""
    parked = device_of(device)._move()  # noqa: SLF001 - the device's own module
    if not parked:
        return

    def free() -> None:
        for close in parked:
            close()

    # A thread of its own: each thread has its own current device, and freeing chooses one.
    thread = threading.Thread(target=free, name="netloader-hccl-free", daemon=True)
    thread.start()
    thread.join(_FREEING)
    if thread.is_alive():
        _log.error("freeing %d HCCL groups on %s takes more than %g s", len(parked), device, _FREEING)


@contextmanager
def blocking_wait() -> Iterator[None]:
    """Have groups that are made in the body raise errors where they are waited for.

    torch_npu reads the variable in each constructor. Without it the watchdog of a group whose peer died ends this whole
    process. Groups that other threads make in this moment get the same; with the variable set they only change in that
    their errors are raised, too.
    """
    with _environment:
        before = os.environ.get(BLOCKING_WAIT)
        os.environ[BLOCKING_WAIT] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[BLOCKING_WAIT]
            else:
                os.environ[BLOCKING_WAIT] = before
