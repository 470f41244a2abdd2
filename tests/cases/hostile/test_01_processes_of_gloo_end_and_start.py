"""The processes of gloo, whatever state the process is in that starts them, and however it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from netloader.errors import TransportError
from netloader.transports.gloo import transport
from netloader.transports.gloo.processes import Spawner
from netloader.transports.gloo.spawner import DESCRIPTORS
from tests.drivers import kit

PATIENCE = 60.0


def test_a_process_that_ignores_the_end_of_its_children_is_told_how_they_ended() -> None:
    """An ignored SIGCHLD is inherited by programs, and then nobody can wait for a child."""
    spawner = Spawner()
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        first = spawner.start()
    finally:
        signal.signal(signal.SIGCHLD, before)
    second = spawner.start()
    try:
        first.kill()  # its sockets close too, and it may see that first
        assert first.obituary(PATIENCE) in {"was ended by SIGKILL", "ended with exit code 0"}
        assert not second.gone(0.2), "the other session goes on"
    finally:
        for process in (first, second):
            process.kill()
            process.close()


def test_nothing_stays_of_a_process_that_ended_while_torch_was_loaded() -> None:
    """A fork of it has all its sockets, so none of them closes."""
    gone = subprocess.Popen(["true"])
    gone.wait(PATIENCE)
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kept = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
    memory = [os.memfd_create("test") for _ in range(2)]
    ends = [*(theirs_too.fileno() for _, theirs_too in kept), *memory]
    assert len(ends) == DESCRIPTORS
    socket.send_fds(control, [b"session"], ends)
    program = [sys.executable, "-P", "-m", "netloader.transports.gloo.spawner", str(gone.pid)]
    with theirs:
        spawner = subprocess.Popen(program, stdin=theirs.fileno(), env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    try:
        assert spawner.wait(PATIENCE) == 0
    finally:
        spawner.kill()
        spawner.wait()
        for pair in kept:
            for sock in pair:
                sock.close()
        for descriptor in memory:
            os.close(descriptor)
        control.close()


async def test_a_spawner_that_has_ended_is_no_zombie_until_the_next_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_REAP_EVERY", 0.02)
    gloo, source = transport.GlooTransport(), kit.weights(rows=3)
    async with kit.serving(gloo, kit.held(source)) as server:
        await kit.pull(kit.blank(source), [kit.at(server)], gloo)
        running = gloo._spawner._running
        assert running is not None
        pid = running._process.pid
        assert process_state(pid) not in ("Z", "")
        running._control.shutdown(socket.SHUT_RDWR)  # it ends, as it does when it was idle for long
        del running
        await kit.until(lambda: not process_state(pid), "it was waited for")
        await kit.pull(kit.blank(source), [kit.at(server)], gloo)


def test_each_event_loop_has_a_timer_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One loop does not know the timers of another: it can neither stop them nor rely on them."""
    monkeypatch.setattr(transport, "_REAP_EVERY", 0.02)
    gloo, looks = transport.GlooTransport(), list[asyncio.AbstractEventLoop]()

    def reap() -> bool:
        looks.append(asyncio.get_running_loop())
        return False

    monkeypatch.setattr(gloo._spawner, "reap", reap)

    async def offers() -> None:
        gloo._reap_later()
        await kit.until(lambda: len({one for one in looks if looks.count(one) > 1}) == len(threads), "both look again")

    threads = [threading.Thread(target=asyncio.run, args=(offers(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(looks)) == len(threads)


def process_state(pid: int) -> str:
    """The state of a process, ``Z`` for a zombie; empty when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except FileNotFoundError:
        return ""


def started_with(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment that the spawner is started with."""
    found: dict[str, str] = {}

    def popen(*_: object, env: dict[str, str], **__: Any) -> object:
        found.update(env)
        raise OSError("not started")

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(TransportError, match="not started"):
        Spawner().start()
    return found


def test_netloader_is_found_if_only_the_current_folder_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``python -c`` and in a notebook."""
    monkeypatch.setattr(sys, "path", ["", "/elsewhere"])
    assert started_with(monkeypatch)["PYTHONPATH"] == f".{os.pathsep}/elsewhere"


def test_a_frozen_program_is_not_started_again_in_place_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(TransportError, match="which program is Python"):
        Spawner().start()
