"""What a test must not do: block the event loop, leave threads or file descriptors behind."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from blockbuster import BlockBuster, BlockBusterFunction, BlockingError

OWN_THREADS = "netloader-"
GRACE = 5.0

_OURS = ("netloader", "tests")
_FOLDERS = tuple(str(Path(__file__).parents[1] / name) for name in _OURS)
_FILES = ("os.", "io.")
"""How the names of calls begin that blockbuster watches because they touch files; the other calls wait for somebody."""

QUICK = {
    "asyncio/base_events.py": ("shutdown_default_executor",),  # joins a thread that is at its end
    "logging/__init__.py": ("emit", "flush"),  # where a log goes is up to the application
    "netloader/api.py": ("software",),  # reads what is installed, once in a process
    "netloader/cli/console.py": ("token_from",),  # a command that has no connection yet
    "netloader/cli/demo_run.py": ("_workplace",),  # as above
    "netloader/discovery/registry.py": ("_entries",),  # reads what is installed, once in a process
    "netloader/tensors/mappings.py": ("mapped", "not_writable"),  # procfs
    "netloader/transports/conformance_kit.py": ("open_descriptors",),  # procfs
    "netloader/transports/faults.py": ("over",),  # a file that ends a fault between processes
    "netloader/transports/gloo/packet_filter.py": ("_sockets",),  # procfs
    "netloader/transports/registry.py": ("_entries",),  # reads what is installed, once in a process
    "netloader/transports/shm/transport.py": ("facts", "missing"),  # procfs
}
"""Where netloader looks at files on the event loop, by intention, and what others do there that is short."""


def _never_waits(thing: Any, *_: object, **__: object) -> bool:
    """Whether this socket, thread or process has nothing that a call might wait for."""
    if isinstance(thing, threading.Thread):
        return not thing.is_alive()
    if isinstance(thing, subprocess.Popen):
        return thing.returncode is not None
    return isinstance(thing, socket.socket) and thing.gettimeout() == 0.0


_MORE = (
    *("queue.SimpleQueue.get", "socket.getaddrinfo", "subprocess.Popen.communicate", "subprocess.Popen.wait"),
    *(f"socket.socket.{name}" for name in ("recvmsg_into", "sendfile", "sendmsg")),
    "threading.Thread.join",
)
"""What blockbuster does not know."""


class BlockingGuard:
    """Makes blocking calls fail while an event loop runs in the calling thread.

    `blockbuster` does the work. Waiting is refused to netloader and to tests; reading and writing of files to netloader
    only. A call that raised here may have been swallowed by the code under test, so each is also kept in `calls`.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._functions = [
            *(each for name, each in BlockBuster("netloader").functions.items() if name.startswith(_FILES)),
            *(each for name, each in BlockBuster(_OURS).functions.items() if not name.startswith(_FILES)),
            *(
                BlockBusterFunction(None, name, scanned_modules=_OURS, can_block_predicate=_never_waits)
                for name in _MORE
            ),
        ]
        for function in self._functions:
            for file, functions in QUICK.items():
                function.can_block_in(file, functions)

    def __enter__(self) -> Self:
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(BlockingError, "__init__", self._noted)
        for function in self._functions:
            function.activate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for function in self._functions:
            function.deactivate()
        self._patch.undo()

    @property
    def _noted(self) -> Callable[[BlockingError, str], None]:
        """In place of ``BlockingError.__init__``: keeps it, and says where."""

        def note(error: BlockingError, name: str) -> None:
            frames = reversed(traceback.extract_stack())
            at = next(f"{each.filename}:{each.lineno}" for each in frames if _is_ours(each.filename))
            self.calls.append(f"{name}() blocks the event loop, called at {at}")
            Exception.__init__(error, self.calls[-1])

        return note


def _is_ours(file: str) -> bool:
    return file.startswith(_FOLDERS) and file != __file__


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
    if not (found := new()):
        return {}
    kept = _of_spawners()
    return {number: target for number, target in found.items() if number not in kept}


def _of_spawners() -> set[int]:
    """Descriptors of processes that fork gloo's sessions. A transport that started one keeps it until it was idle for
    long, so the test in which it starts is not the one that has to end it."""
    processes: Any = sys.modules.get("netloader.transports.gloo.processes")
    running = [] if processes is None else [one for one in gc.get_objects() if type(one) is processes._Running]
    return {number for one in running for number in (one.words, one._control.fileno())}


def descriptors() -> dict[int, str]:
    """Every open file descriptor of this process and what it points to."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            found[int(link.name)] = str(link.readlink())
        except FileNotFoundError:
            continue  # the descriptor that listed the folder
    return found
