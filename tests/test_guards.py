"""The guards of `tests.guards` find what they are there for, and nothing else."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from tests import guards


@pytest.fixture
def guard() -> Iterator[guards.BlockingGuard]:
    inner = guards.BlockingGuard()
    with pytest.MonkeyPatch.context() as patch:
        inner.install(patch)
        yield inner


def _blocking_recv() -> None:
    left, right = socket.socketpair()
    with left, right:
        right.send(b"x")
        left.recv(1)


def _join() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        thread.join()
    finally:
        done.set()


def _wait_for_process() -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)


BLOCKING: dict[str, Callable[[], object]] = {
    "sleep": lambda: time.sleep(0),
    "resolve": lambda: socket.getaddrinfo("localhost", 1),
    "recv": _blocking_recv,
    "join": _join,
    "event": lambda: threading.Event().wait(0),
    "future": lambda: concurrent.futures.Future[None]().result(0),
    "queue": lambda: queue.Queue[None]().get(timeout=0.001),
    "process": _wait_for_process,
}


@pytest.mark.allow_blocking(reason="the calls under test do")
@pytest.mark.parametrize("name", [name for name in BLOCKING if name != "process"])
async def test_blocking_call_in_the_loop_fails(name: str, guard: guards.BlockingGuard) -> None:
    with pytest.raises(guards.BlockingCall, match=r"blocks the event loop, called at .*test_guards\.py"):
        BLOCKING[name]()
    assert len(guard.calls) == 1


@pytest.mark.allow_blocking(reason="the calls under test do")
async def test_waiting_for_a_process_in_the_loop_fails(guard: guards.BlockingGuard) -> None:
    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)

    process = await anyio.to_thread.run_sync(start)
    try:
        with pytest.raises(guards.BlockingCall, match="wait"):
            process.wait()
    finally:
        guard.calls.clear()
        await anyio.to_thread.run_sync(process.communicate)
    assert process.returncode is not None


@pytest.mark.parametrize("name", sorted(BLOCKING))
async def test_the_same_in_a_thread_is_fine(name: str, guard: guards.BlockingGuard) -> None:
    def run() -> None:
        try:
            BLOCKING[name]()
        except (TimeoutError, queue.Empty):
            return  # what it waited for never came, as it should be

    if name == "join":
        return  # would wait for itself
    await anyio.to_thread.run_sync(run)
    assert guard.calls == []


async def test_the_loop_itself_is_fine(guard: guards.BlockingGuard) -> None:
    async def echo(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.send(await stream.receive())

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, echo)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with await anyio.connect_tcp("localhost", port) as stream:
            await stream.send(b"hello")
            assert await stream.receive() == b"hello"
        await anyio.to_thread.run_sync(lambda: None)
        await asyncio.get_running_loop().shutdown_default_executor()
        group.cancel_scope.cancel()
    assert guard.calls == []


def test_outside_a_loop_nothing_is_watched(guard: guards.BlockingGuard) -> None:
    BLOCKING["sleep"]()
    BLOCKING["recv"]()
    assert guard.calls == []


async def test_asyncio_makes_the_checks_of_its_debug_mode(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.get_running_loop()
    with pytest.raises(RuntimeError, match="other than the current one"):
        await anyio.to_thread.run_sync(loop.call_soon, print)
    with socket.socket() as blocking, pytest.raises(ValueError, match="must be non-blocking"):
        await loop.sock_connect(blocking, ("127.0.0.1", 1))
    loop.slow_callback_duration = 0.0
    with caplog.at_level(logging.WARNING, "asyncio"):
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
    assert "Executing <" in caplog.text


def test_a_thread_of_ours_is_found_until_it_ends() -> None:
    before = threading.enumerate()
    done = threading.Event()
    ours = threading.Thread(target=done.wait, name="netloader-test")
    other = threading.Thread(target=done.wait, name="somebody-else")
    ours.start()
    other.start()
    try:
        found = guards.own_threads(besides=before, grace=0)
        assert found == [ours]
        assert "netloader-test" in guards.stacks(found)
        assert guards.own_threads(besides=threading.enumerate(), grace=0) == []
    finally:
        done.set()
        other.join()
    assert guards.own_threads(besides=before) == []


@pytest.mark.usefixtures("no_leaked_descriptors")
def test_an_open_descriptor_is_found() -> None:
    before = guards.descriptors()
    read, write = os.pipe()
    try:
        assert set(guards.descriptors()) - set(before) == {read, write}
    finally:
        os.close(read)
        os.close(write)
    assert guards.descriptors() == before
