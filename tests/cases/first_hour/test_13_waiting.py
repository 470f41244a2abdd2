"""Waiting is a phase of its own: shown with the source, the reason and the time, and no part of any rate."""

from __future__ import annotations

import logging

import anyio
import pytest
import torch

import netloader
from netloader.core import pull_clock
from netloader.core import pull_events as p
from netloader.core.addresses import parse_address
from netloader.core.options import PullOptions
from netloader.core.protocol.events import Announcement
from netloader.core.pull_clock import PullClock
from netloader.core.report import Progress
from netloader.errors import NoSourceLeft, PeerLost, RefusedError
from netloader.observe import Event, SourceWaiting
from netloader.observe.progress import ProgressLog

SOURCE = "10.0.0.7:19374"
LOADING = RefusedError("not-ready", "the model is still being loaded")
MB = 1_000_000


def clock(wait: float = 120.0) -> PullClock:
    made = PullClock(PullOptions(wait=wait, timeout=1200.0), began=100.0)
    made.connecting(p.Connect(1, parse_address(SOURCE)))
    return made


def announced(number: int) -> p.HoldingAnnounced:
    return p.HoldingAnnounced(number, Announcement.__new__(Announcement))


def test_a_wait_names_source_reason_and_times() -> None:
    time = clock()
    time.take(p.SessionEnded(1, LOADING), 100.1)
    assert time.report(100.5) is None, "a pull that begins at once does not wait"
    assert time.report(143.0) == (43.0, SOURCE, "the model is still being loaded", 43.0, 120.0)
    assert time.report(143.5) is None, "at most one report per second"
    assert str(SourceWaiting(*(time.report(144.0) or ()))) == (
        f"waiting for {SOURCE}: the model is still being loaded, 44 of 120 s"
    )


def test_a_source_that_cannot_be_reached_is_named_once() -> None:
    time = clock()
    time.take(p.SessionEnded(1, PeerLost(f"{SOURCE} cannot be reached: Connection refused")), 100.1)
    wait = time.report(102.0)
    assert wait is not None
    assert (wait.source, wait.reason) == (SOURCE, "cannot be reached: Connection refused")


def test_a_queued_client_waits_for_its_turn_until_the_timeout() -> None:
    time = clock(wait=0.0)
    time.take(p.SessionQueued(1), 100.1)
    assert time.report(110.0) == (10.0, SOURCE, "waiting for a turn", 10.0, 1200.0)


def test_waiting_set_up_and_transfer_are_counted_apart() -> None:
    time = clock()
    time.take(p.SessionEnded(1, LOADING), 100.1)
    time.connecting(p.Connect(2, parse_address(SOURCE)))
    time.take(announced(2), 177.0)
    assert time.due() is None, "a source has accepted: the pull does not wait"
    time.take(p.SessionReady(2), 178.0)
    time.stop(194.0)
    time.take(p.SessionEnded(2), 195.0)
    assert (time.waited, time.transferred) == (77.0, 16.0)


def test_a_pull_that_lost_its_source_waits_again() -> None:
    time = clock(wait=300.0)
    time.take(announced(1), 101.0)
    time.take(p.SessionReady(1), 101.0)
    time.take(p.SessionEnded(1, PeerLost("the peer is gone")), 111.0)
    assert time.report(111.5) is None
    assert time.report(115.0) == (15.0, SOURCE, "the peer is gone", 4.0, 289.0)
    assert (time.waited, time.transferred) == (1.0, 10.0)


def test_the_rate_and_the_time_left_count_from_the_end_of_the_wait() -> None:
    lines: list[str] = []
    log = ProgressLog(lines.append, every=5)
    for second in range(1, 78):
        log(SourceWaiting(float(second), SOURCE, "loading", float(second), 120.0))
    waits, lines[:] = list(lines), []
    for second in range(78, 94):
        log(Progress((second - 77) * 24 * MB, 404 * MB, float(second), SOURCE))
    log(Progress(404 * MB, 404 * MB, 94.0, SOURCE))
    assert waits[0] == f"waiting for {SOURCE}: loading, 5 of 120 s"
    assert len(waits) == 4, "the lines come less often while nothing changes"
    assert lines[0].endswith(", 24.0 MB/s, 0:16 left")
    assert lines[-1] == "pulled 404 MB of 404 MB (100%), 23.8 MB/s"


def test_the_last_line_can_be_left_to_the_summary() -> None:
    lines: list[str] = []
    ProgressLog(lines.append, every=0, last=False)(Progress(MB, MB, 1.0, SOURCE))
    assert lines == []


async def test_a_pull_that_waits_says_so_and_reports_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "netloader")
    monkeypatch.setattr(pull_clock, "_SAY_EVERY", 0.05)
    seen: list[SourceWaiting] = []
    waits = anyio.Event()

    def watch(event: Event) -> None:
        if isinstance(event, SourceWaiting):
            seen.append(event)
            waits.set()

    weights = {"w": torch.arange(1000)}
    async with netloader.Server(host="127.0.0.1", transport="tcp") as server:
        server.expect("target", "raw", reason="the model is still being loaded", retry_after=0.05)

        async def hold() -> None:
            await waits.wait()
            await server.hold(weights, netloader.ModelIdentity())

        filled = {"w": torch.zeros(1000, dtype=torch.int64)}
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hold)
            report = await netloader.pull(filled, sources=[server.address], wait=60, transport="tcp", observers=[watch])
    assert str(server.address) == seen[-1].source
    assert "the model is still being loaded" in seen[-1].reason
    assert seen[-1].limit == 60
    assert report.waited > 0
    assert report.waited + report.transfer_seconds <= report.seconds
    assert report.rate == report.nbytes / report.transfer_seconds
    said = [record.getMessage() for record in caplog.records]
    assert sum(line.startswith("netloader: pulled 8.00 kB (target, 1 tensor) in ") for line in said) == 1


async def test_a_hint_does_not_ask_for_what_is_set(free_tcp_port: int) -> None:
    source = [f"127.0.0.1:{free_tcp_port}"]
    with pytest.raises(NoSourceLeft) as caught:
        await netloader.pull({"w": torch.zeros(1)}, sources=source, transport="tcp")
    assert "set WAIT to wait for sources that are not there yet" in caught.value.hint
    with pytest.raises(NoSourceLeft) as caught:
        await netloader.pull({"w": torch.zeros(1)}, sources=source, transport="tcp", wait=0.01)
    assert "WAIT (0.01 s) has passed" in caught.value.hint
    assert "set WAIT" not in caught.value.hint
