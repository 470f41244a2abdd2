"""The guards of `tests.guards` find what they are there for, and nothing else."""

from __future__ import annotations

import ast
import asyncio
import concurrent.futures
import gc
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from blockbuster import BlockingError

from netloader.transports.gloo.processes import Spawner
from tests import guards

ROOT = Path(__file__).parents[1]


@pytest.fixture
def guard() -> Iterator[guards.BlockingGuard]:
    with guards.BlockingGuard() as inner:
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


def _lock() -> None:
    lock = threading.Lock()
    with lock:
        lock.acquire(timeout=0.001)


def _wait_for_process() -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)


BLOCKING: dict[str, Callable[[], object]] = {
    "sleep": lambda: time.sleep(0),
    "resolve": lambda: socket.getaddrinfo("localhost", 1),
    "recv": _blocking_recv,
    "join": _join,
    "event": lambda: threading.Event().wait(0.001),
    "future": lambda: concurrent.futures.Future[None]().result(0.001),
    "lock": _lock,
    "queue": lambda: queue.Queue[None]().get(timeout=0.001),
    "simple queue": lambda: queue.SimpleQueue[None]().get(timeout=0.001),
    "process": _wait_for_process,
}


@pytest.mark.allow_blocking(reason="the calls under test do")
@pytest.mark.parametrize("name", [name for name in BLOCKING if name != "process"])
async def test_blocking_call_in_the_loop_fails(name: str, guard: guards.BlockingGuard) -> None:
    with pytest.raises(BlockingError, match=r"blocks the event loop, called at .*test_guards\.py"):
        BLOCKING[name]()
    assert len(guard.calls) == 1


@pytest.mark.allow_blocking(reason="the calls under test do")
async def test_waiting_for_a_process_in_the_loop_fails(guard: guards.BlockingGuard) -> None:
    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)

    process = await anyio.to_thread.run_sync(start)
    try:
        with pytest.raises(BlockingError, match="wait"):
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


FILES: dict[str, Callable[[Path], object]] = {
    "look at": Path.exists,
    "list": lambda path: [*path.parent.iterdir()],
    "read": Path.read_bytes,
    "write": lambda path: path.write_text("more", encoding="ascii"),
}


def as_netloader(call: Callable[[Path], object], file: str, function: str) -> Callable[[Path], object]:
    """A function of this name in a file of the package, which makes the call."""
    names: dict[str, Any] = {"call": call}
    exec(compile(f"def {function}(path):\n    return call(path)\n", str(ROOT / file), "exec"), names)
    made: Callable[[Path], object] = names[function]
    return made


@pytest.mark.allow_blocking(reason="the calls under test do")
@pytest.mark.parametrize("name", FILES)
async def test_netloader_leaves_files_alone_in_the_loop(name: str, guard: guards.BlockingGuard, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    FILES[name](path)
    as_netloader(FILES[name], "netloader/transports/shm/transport.py", "facts")(path)
    await anyio.to_thread.run_sync(as_netloader(FILES[name], "netloader/api.py", "pull"), path)
    assert guard.calls == []
    with pytest.raises(BlockingError, match=r"blocks the event loop, called at .*(api|test_guards)\.py:"):
        as_netloader(FILES[name], "netloader/api.py", "pull")(path)
    assert len(guard.calls) == 1


@pytest.mark.parametrize("file", [file for file in guards.QUICK if file.startswith("netloader/")])
def test_where_files_may_be_looked_at_exists(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert set(guards.QUICK[file]) <= defined


def test_what_was_watched_is_as_it_was_before(guard: guards.BlockingGuard) -> None:
    with guards.BlockingGuard() as inner:
        watched = time.sleep
    assert time.sleep is not watched
    assert inner.calls == guard.calls == []


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


def test_the_process_that_forks_for_gloo_is_not_left_by_the_test_that_started_it() -> None:
    before = guards.descriptors()
    spawner = Spawner()
    session = spawner.start()
    try:
        left = guards.new_descriptors(before)
        assert len(left) == 5, "a session's own descriptors are found"
    finally:
        session.kill()
        session.close()
    assert guards.new_descriptors(before) == {}
    assert len(set(guards.descriptors()) - set(before)) == 2, "its control socket and its standard error"
    del spawner, session
    gc.collect()
    assert guards.descriptors() == before
