"""The program that starts the process of each session: ``python -m netloader.transports.gloo.spawner PARENT``.

Importing torch takes a second, and forking a process that has imported it takes milliseconds. This process never makes
a gloo object and has one thread, so its forks are sound. It kills a session's process when told to, and says how each
one ended. It ends when the process that started it is gone, and some time after the last session, so that torch does
not occupy memory for nothing. All processes of sessions end with it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress

import torch

from netloader.transports.gloo.session import run_session

__all__ = ["DESCRIPTORS", "main"]

DESCRIPTORS = 5
"""What comes with a request: the socket to watch the session, its two sockets for commands, memory, standard error."""

_IDLE = 30.0
"""Seconds without a session after which this process ends."""

_LOOK = 5.0
"""Seconds between two checks whether the process that started this one still runs. A copy of it, made by a fork, may
keep the control socket open."""

_LAST_WORDS = 1 << 20
"""Most bytes that a session's process may write to its standard error."""

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals for a whole group of processes. The process that started this one decides when a session ends."""


class _Children:
    """The processes of sessions.

    Each holds the writing end of a pipe as long as it lives, so that its end is seen with any kernel.
    """

    def __init__(self) -> None:
        self._ended: dict[int, tuple[int, socket.socket, int]] = {}  # pipe -> pid, watch, pipe
        self._watched: dict[int, int] = {}  # watch -> pipe

    def __len__(self) -> int:
        return len(self._ended)

    def add(self, pid: int, watch: socket.socket, pipe: int) -> None:
        self._ended[pipe] = pid, watch, pipe
        self._watched[watch.fileno()] = pipe

    def descriptors(self) -> list[int]:
        """What becomes readable when a process has ended, or has to."""
        return [*self._ended, *self._watched]

    def handle(self, descriptor: int) -> None:
        """Look after a descriptor that is readable."""
        if descriptor in self._watched:
            pid, _, _ = self._ended[self._watched.pop(descriptor)]
            os.kill(pid, signal.SIGKILL)  # it can't be another process: this one has not waited for it
        elif descriptor in self._ended:
            pid, watch, pipe = self._ended.pop(descriptor)
            self._watched.pop(watch.fileno(), None)
            _, status = os.waitpid(pid, 0)
            with watch, suppress(OSError):  # nobody is interested any more
                watch.send(str(os.waitstatus_to_exitcode(status)).encode())
            os.close(pipe)


def main() -> None:
    """Start processes as standard input, a Unix socket, asks for them. The argument is the pid of who started this."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if the parent ignores it, no process could be waited for
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a process that gloo aborts would write all of torch to a file
    torch.set_num_threads(1)
    _prctl(_PR_SET_NAME, b"netloader-gloo")
    gc.freeze()
    control = socket.socket(fileno=os.dup(0))
    parent = int(sys.argv[1])  # it may have ended while torch was loaded
    children = _Children()
    idle_since = time.monotonic()
    closing = False
    while not (closing and not children):
        waiting = children.descriptors() if closing else [control.fileno(), *children.descriptors()]
        for descriptor in _readable(waiting):
            if descriptor != control.fileno():
                children.handle(descriptor)
            elif not _start(control, children):
                return
        if os.getppid() != parent:
            return
        if children:
            idle_since = time.monotonic()
        elif not closing and time.monotonic() - idle_since > _IDLE:
            closing = True
            control.shutdown(socket.SHUT_RD)  # later requests fail, so that they are made to another process
            while _start(control, children):  # those that were made before
                pass


def _readable(descriptors: list[int]) -> list[int]:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(_LOOK * 1000)]


def _start(control: socket.socket, children: _Children) -> bool:
    """Start the process that the next message asks for. False when there will be no more messages."""
    message, descriptors, _, _ = socket.recv_fds(control, 16, DESCRIPTORS)
    if not message:
        return False
    if len(descriptors) != DESCRIPTORS:
        for descriptor in descriptors:
            os.close(descriptor)
        return True  # the socket to watch it is closed, so the asking side sees that it failed
    reading, writing = os.pipe()
    spawner = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become_session(spawner, descriptors, writing)
    os.close(writing)
    watch, *others = descriptors
    for descriptor in others:
        os.close(descriptor)
    children.add(pid, socket.socket(fileno=watch), reading)
    return True


def _become_session(spawner: int, descriptors: list[int], alive: int) -> None:
    """In the forked process: run the session. Does not return."""
    status = 1
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != spawner:
            os._exit(0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (_LAST_WORDS, _LAST_WORDS))  # Python ignores the signal for it
        _, sending, receiving, memory, words = descriptors
        os.dup2(words, 2)
        os.dup2(1, 0)
        _close_all_but({0, 1, 2, sending, receiving, memory, alive})
        run_session(socket.socket(fileno=sending), socket.socket(fileno=receiving), memory)
        status = 0
    except BaseException:  # noqa: BLE001 - the process ends here, and its last words are read by another one
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _close_all_but(kept: set[int]) -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    edges = sorted(kept)
    for low, high in zip(edges, [*edges[1:], limit if limit >= 0 else 1 << 20], strict=True):
        os.closerange(low + 1, high)


def _prctl(option: int, value: int | bytes) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


if __name__ == "__main__":
    main()
    os._exit(0)  # without taking torch apart
