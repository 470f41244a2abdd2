"""The state that all HCCL links of a process share for each device: turns, memory, and periods without changes.

All users of a device share its collective library, including the engine's own communicators, so this state is kept once
for each process. It is the second allowed exception to "no global state", besides the server handle of a vLLM worker
(docs/decisions/0011-hccl-turns.md, 0013-hccl-windows.md).
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

__all__ = ["Device", "FifoLock", "blocking_wait", "device_of", "hold_still", "move_again"]

BLOCKING_WAIT = "TORCH_HCCL_BLOCKING_WAIT"

_LOOK = 0.02
"""Seconds between two checks whether a link that waits for its turn has given up."""

_FREEING = 30.0
"""Seconds that freeing groups after :func:`move_again` may take before an error is logged."""

_log = logging.getLogger(__name__)
_environment = threading.Lock()
_registry = threading.Lock()
_devices: dict[str, Device] = {}


class FifoLock:
    """A fair lock: waiters get it in first-in, first-out order, and may give up."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiters: deque[object] = deque()

    def take(self, who: object, seconds: float, given_up: Callable[[], bool] = lambda: False) -> None:
        """Wait for the turn.

        Args:
            who: The waiter; it must not be waiting or have the lock already.
            seconds: The most seconds to wait.
            given_up: Called at intervals; returns whether to stop waiting. Must be callable from any thread, and must
                not block.

        Raises:
            TransferTimeout: The turn did not come in time.
            PeerLost: `given_up` returned True.
        """
        until = time.monotonic() + seconds
        with self._changed:
            self._waiters.append(who)
            try:
                while self._waiters[0] is not who:
                    self._changed.wait(_LOOK)
                    if given_up():
                        raise PeerLost("the wait for the device's turn was cancelled")
                    if time.monotonic() > until:
                        raise TransferTimeout(
                            f"{len(self._waiters) - 1} other links of this device came first for {seconds:g} s",
                            hint="serve fewer clients at once (MAX_CLIENTS)",
                        )
            except BaseException:
                self._waiters.remove(who)
                self._changed.notify_all()
                raise

    def give(self, who: object) -> None:
        """End the turn of `who`; does nothing when it has none."""
        with self._changed:
            if self._waiters and self._waiters[0] is who:
                self._waiters.popleft()
                self._changed.notify_all()


@dataclass
class Device:
    """The HCCL state of one device in this process.

    Attributes:
        name: Name of the device, as torch writes it (``npu:3``).
        turns: The lock that a link holds to make a communicator, or to send or receive a window.
    """

    name: str
    turns: FifoLock = field(default_factory=FifoLock)
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
        """A communicator was closed, or is being closed."""
        with self._lock:
            self._taken.pop(id(group), None)

    def usage(self) -> tuple[int, int]:
        """The number of open communicators, and the bytes of device memory that they use."""
        with self._lock:
            return len(self._taken), sum(self._taken.values())

    def check_may_open(self) -> None:
        """Check that a communicator may be made now.

        Raises:
            RefusedError: It may not be made now; the error says when to try again.
        """
        with self._lock:
            still = self._still
        if still is not None and time.monotonic() < still[2]:
            reason, retry_after, _ = still
            raise RefusedError(
                "busy",
                f"no HCCL group can be made on {self.name} now: {reason}",
                hint="it is over soon: a client tries again while its WAIT lasts",
                retry_after=retry_after,
            )

    def close_when_allowed(self, close: Callable[[], object]) -> None:
        """Call `close` now, or after :func:`move_again` if the device is held still."""
        with self._lock:
            if self._still is not None:
                self._parked.append(close)
                return
        close()

    def keep(self, work: Any, tensor: Any) -> None:
        """Keep memory that an operation may still write to, so that the allocator can't reuse it before."""
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
    """The state of a device; the same object for all links of this process."""
    with _registry:
        return _devices.setdefault(name, Device(name))


def hold_still(device: str, reason: str, retry_after: float, wait: float = 60.0, longest: float = float("inf")) -> None:
    """From now on make and free no communicator on `device`. Clients are refused with "busy", and when to try again.

    Waits until a communicator that is being made is complete, or a window in transfer has moved. Must not be called in
    an event loop's thread.

    Use it while the memory of the device is measured: call it when vLLM's ``load_model`` ends, and :func:`move_again`
    after its memory profiling. Running transfers continue.

    Args:
        device: Name of the device, as torch writes it (``npu:3``).
        reason: The reason that clients are given.
        retry_after: Seconds after which clients may try again.
        wait: The most seconds to wait.
        longest: Seconds after which groups are made again, even without :func:`move_again`.

    Raises:
        TransferTimeout: The device was in use for all of that time. No new group is made all the same.
    """
    account = device_of(device)
    account._be_still(reason, retry_after, longest)  # noqa: SLF001 - the device's own module
    who = object()
    account.turns.take(who, wait)
    account.turns.give(who)


def move_again(device: str) -> None:
    """End :func:`hold_still`, and close what had to wait for it. Does nothing when the device is not held still."""
    parked = device_of(device)._move()  # noqa: SLF001 - the device's own module
    if not parked:
        return

    def free() -> None:
        for close in parked:
            close()

    # In a new thread, because freeing changes the current device of its thread.
    thread = threading.Thread(target=free, name="netloader-hccl-free", daemon=True)
    thread.start()
    thread.join(_FREEING)
    if thread.is_alive():
        _log.error("freeing %d HCCL groups on %s takes more than %g s", len(parked), device, _FREEING)


@contextmanager
def blocking_wait() -> Iterator[None]:
    """Make groups that are created in the body raise their errors in the waiting call.

    torch_npu reads the variable in each constructor. Without it, the watchdog of a group whose peer died ends this
    process. Groups that other threads create at the same time are affected too, but only in how errors are raised.
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
