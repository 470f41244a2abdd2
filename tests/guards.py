"""What a test must not do: block the event loop, leave threads or file descriptors behind."""

from __future__ import annotations

import asyncio
import gc
import queue
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

OWN_THREADS = "netloader-"
GRACE = 5.0

# Whose fault a blocking call is: the first frame above it that is not one of these.
_PASSED_THROUGH = ("concurrent.", "contextlib", "multiprocessing.", "queue", "socket", "subprocess", __name__)
_GUILTY = ("netloader", "tests")
_SOCKET_CALLS = (
    *("accept", "connect", "recv", "recv_into", "recvfrom", "recvfrom_into", "recvmsg", "recvmsg_into"),
    *("send", "sendall", "sendfile", "sendmsg", "sendto"),
)


class BlockingCall(AssertionError):
    """A call that may block was made inside a running event loop."""


class BlockingGuard:
    """Makes blocking calls fail while an event loop runs in the calling thread.

    Only calls made by netloader or by a test count: asyncio and anyio wait inside the loop in places of their own
    (joining the thread that shuts the executor down, for example). A call that raised here may have been swallowed by
    the code under test, so each is also kept in `calls`.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Wrap the blocking calls of the standard library until `patch` is undone."""
        self._wrap(patch, time, "sleep")
        self._wrap(patch, socket, "getaddrinfo")
        for name in _SOCKET_CALLS:
            self._wrap(patch, socket.socket, name, when=_socket_waits)
        self._wrap(patch, threading.Thread, "join", when=_is_alive)
        self._wrap(patch, threading.Condition, "wait")
        self._wrap(patch, queue.SimpleQueue, "get")
        self._wrap(patch, subprocess.Popen, "wait", when=_is_running)
        self._wrap(patch, subprocess.Popen, "communicate")

    def _wrap(
        self, patch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[[Any], bool] | None = None
    ) -> None:
        original = getattr(owner, name)

        @wraps(original)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if asyncio._get_running_loop() is not None and (when is None or when(args[0])):
                culprit = _culprit()
                if culprit is not None:
                    call = f"{getattr(owner, '__name__', owner)}.{name}() blocks the event loop, called at {culprit}"
                    self.calls.append(call)
                    raise BlockingCall(call)
            return original(*args, **kwargs)

        try:
            patch.setattr(owner, name, guarded)
        except TypeError:
            # Types written in C take no attribute (queue.SimpleQueue); what cannot be watched is left alone.
            return


def _socket_waits(sock: socket.socket) -> bool:
    return sock.gettimeout() != 0.0


def _is_alive(thread: threading.Thread) -> bool:
    return thread.is_alive()


def _is_running(process: subprocess.Popen[Any]) -> bool:
    return process.returncode is None


def _culprit() -> str | None:
    frame = sys._getframe(2)
    while frame.f_back is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module == "threading":
            if frame.f_code.co_name == "start":
                return None  # waiting for a new thread to report that it runs is short, and everybody does it
        elif not module.startswith(_PASSED_THROUGH):
            if module.split(".", maxsplit=1)[0] in _GUILTY:
                return f"{frame.f_code.co_filename}:{frame.f_lineno}"
            return None
        frame = frame.f_back
    return None


def own_threads(besides: Iterable[threading.Thread] = (), grace: float = GRACE) -> list[threading.Thread]:
    """Our threads that still run after `grace` seconds (all together), without those in `besides`."""
    known = set(besides)
    deadline = time.monotonic() + grace
    found = [thread for thread in threading.enumerate() if thread.name.startswith(OWN_THREADS) and thread not in known]
    for thread in found:
        thread.join(max(0.0, deadline - time.monotonic()))
    return [thread for thread in found if thread.is_alive()]


def stacks(threads: Iterable[threading.Thread]) -> str:
    """Where each of these threads is now, for the message of a failing test."""
    frames = sys._current_frames()
    parts = []
    for thread in threads:
        frame = frames.get(thread.ident) if thread.ident is not None else None
        where = "".join(traceback.format_stack(frame)) if frame is not None else "(ended meanwhile)\n"
        parts.append(f"{thread.name}:\n{where}")
    return "\n".join(parts)


def new_descriptors(before: Mapping[int, str]) -> dict[int, str]:
    """Open descriptors that were not there `before`, or pointed elsewhere, when all garbage is collected."""

    def new() -> dict[int, str]:
        return {number: target for number, target in descriptors().items() if before.get(number) != target}

    if new():
        gc.collect()  # takes longer than most tests: only where it may make a difference
    return new()


def descriptors() -> dict[int, str]:
    """Every open file descriptor of this process and what it points to."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            found[int(link.name)] = str(link.readlink())
        except FileNotFoundError:
            continue  # the descriptor that listed the folder
    return found
