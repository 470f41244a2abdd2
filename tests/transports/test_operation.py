"""The state that the threads of one operation share."""

from __future__ import annotations

import pytest

from netloader.errors import TransferTimeout
from netloader.transports.io import operation as operation_module
from netloader.transports.io.operation import Operation

STALL = 8.0


class Clock:
    """A clock whose time the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """The time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(operation_module, "time", clock)
    return clock


def looks(operation: Operation, clock: Clock) -> int:
    """Number of seconds, with one check in each, until the operation times out."""
    for second in range(100):
        clock.now += 1
        try:
            operation.check_stall()
        except TransferTimeout:
            return second
    return 100


def test_a_silent_peer_is_detected_after_the_stall_time(clock: Clock) -> None:
    assert looks(Operation("the peer sends nothing", [], None, STALL, lambda: None), clock) == STALL


def test_progress_restarts_the_stall_time(clock: Clock) -> None:
    operation = Operation("the peer sends nothing", [], None, STALL, lambda: None)
    for _ in range(50):
        clock.now += 5
        operation.check_stall()
        operation.moved()
    assert looks(operation, clock) == STALL


def test_a_suspended_host_does_not_make_its_peer_count_as_silent(clock: Clock) -> None:
    operation = Operation("the peer sends nothing", [], None, STALL, lambda: None)
    clock.now += 3600
    operation.check_stall()
    assert looks(operation, clock) == STALL - 2
