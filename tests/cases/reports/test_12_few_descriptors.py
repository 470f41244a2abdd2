"""60 idle connections at a server with 40 descriptors: one line in its log, and it goes on serving."""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from netloader.checkpoint import make_demo_checkpoint
from tests.commands import PATIENCE, no_traceback, run, serving
from tests.drivers import kit


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit of util-linux")
def test_a_server_with_40_descriptors_tells_of_60_connections_in_one_line_and_serves(tmp_path: Path) -> None:
    make_demo_checkpoint(tmp_path / "model", 1 << 20)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(tmp_path / "model", within=["prlimit", "--nofile=40"]))
        host, _, port = server.address.rpartition(":")
        for _ in range(60):
            stack.enter_context(socket.create_connection((host, int(port)), PATIENCE))
        done = run("pull", server.address, "-o", tmp_path / "copy")
        server.process.terminate()
        told = server.read_to_end()
    assert done.returncode == 0, done.stdout + done.stderr
    assert no_traceback(told), told
    lines = [line for line in told.splitlines() if " WARNING " in line or " ERROR " in line]
    assert len(lines) == 1, told
    assert "a connection was closed to make room for others" in lines[0]


async def test_a_connection_for_which_no_file_can_be_opened_is_one_line_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub = kit.Hub()

    def none_left(*_: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    hello = kit.hello(hub.transport)
    async with kit.serving(hub.transport, kit.held(kit.weights())) as server:
        monkeypatch.setattr(hub.transport, "facts", none_left)
        for _ in range(5):
            async with kit.fake_client(server) as wire:
                await wire.say(hello)
                await wire.closed()
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.exc_info is None
    assert "Too many open files" in record.getMessage()
    assert "raise the limit of open files" in record.getMessage()
