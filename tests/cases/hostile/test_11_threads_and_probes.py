"""A host without free threads: the session says so. Probes: paced like strays."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from netloader.errors import NoSourceLeft
from netloader.server import server as server_module
from netloader.transports.tcp import TcpTransport
from tests.drivers import kit

SOURCE = kit.weights()
HOLDING = kit.held(SOURCE)


async def test_a_session_that_gets_no_thread_fails_with_the_reason_and_the_next_one_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    transport, into = TcpTransport(lanes=2), kit.blank(SOURCE)
    start = threading.Thread.start

    def no_more(thread: threading.Thread) -> None:
        if thread.name == "netloader-tcp-send-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    async with kit.serving(transport, HOLDING) as server:
        monkeypatch.setattr(threading.Thread, "start", no_more)
        with pytest.raises(NoSourceLeft, match="this process can't start another thread"):
            await kit.pull(into, [kit.at(server)], transport)
        monkeypatch.setattr(threading.Thread, "start", start)
        await kit.pull(into, [kit.at(server)], transport)
    assert kit.contents(into) == kit.contents(SOURCE)
    assert "raise the limit of threads" in caplog.text
    assert "bug" not in caplog.text
    assert all(record.levelno <= logging.WARNING for record in caplog.records)


async def test_probes_are_paced(monkeypatch: pytest.MonkeyPatch) -> None:
    import netloader

    monkeypatch.setattr(server_module, "_STRAY_PAUSE", 60.0)
    hub = kit.Hub()
    async with kit.serving(hub.transport, HOLDING) as server:
        await netloader.probe(kit.at(server))
        await kit.until(lambda: server.ended)
        assert server._pace.wait(time.monotonic()) > 50.0
