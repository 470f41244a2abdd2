"""Starts and ends the processes in which gloo runs, one for each session.

Gloo ends its process, or spins, when a peer violates its protocol, and its calls can't be interrupted. In a process of
its own that has no memory of the caller, this costs the session only, and killing it ends everything at once.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from contextlib import suppress

from netloader.errors import TransportError, shown

__all__ = ["SessionProcess", "Spawner"]

_ASKING = 5.0
"""Seconds that handing over a request may take. It fits into a buffer, unless hundreds of others do not start."""

_LAST_WORDS = 2048
"""Bytes at the end of a standard error that are searched for the last line."""

_LONGEST_LINE = 300

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",  # with more, importing numpy starts threads
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # no library of an accelerator is needed
}


class SessionProcess:
    """The process of one session, seen from the process that started it.

    Attributes:
        sending: Socket for setting up, then for operations that send.
        receiving: Socket for operations that receive.
        memory: Descriptor of the memory that both processes map.
    """

    def __init__(self, running: _Running) -> None:
        self.memory = os.memfd_create("netloader-gloo")
        self._words = os.memfd_create("netloader-gloo-stderr")
        self.sending, sending = _socket_pair()
        self.receiving, receiving = _socket_pair()
        self._watch, watch = _socket_pair()
        self._running = running
        self._status: str | None = None
        self._closed = False
        self._lock = threading.Lock()  # two threads may want to know how it ended
        with sending, receiving, watch:
            ends = [watch.fileno(), sending.fileno(), receiving.fileno(), self.memory, self._words]
            try:
                running.ask(ends)
            except BaseException:
                self.close()
                raise

    def kill(self) -> None:
        """End it. Any thread may call it; it does not wait."""
        for sock in (self._watch, self.sending, self.receiving):
            with suppress(OSError):  # it has ended
                # Not only closed: a fork of this process may have a copy.
                sock.shutdown(socket.SHUT_WR if sock is self._watch else socket.SHUT_RDWR)

    def gone(self, within: float) -> bool:
        """Wait until it has ended. Returns False when it still runs after `within` seconds."""
        with self._lock:
            if self._status is not None or self._closed:
                return True
            self._watch.settimeout(within)
            try:
                self._status = self._watch.recv(16).decode()
            except TimeoutError:
                return False
            except OSError:
                self._status = ""  # its spawner is gone, and it ended with it
            return True

    def obituary(self, within: float) -> str:
        """How it ended, as the end of a sentence whose subject is the process."""
        if not self.gone(within):
            return f"does not answer, and has not ended within {within:g} s"
        if not self._status:
            return f"could not be started, or was ended with its spawner{_quoted(self._running.words)}"
        code = int(self._status)
        how = f"ended with exit code {code}"
        if code < 0:
            try:
                how = f"was ended by {signal.Signals(-code).name}"
            except ValueError:
                how = f"was ended by signal {-code}"
        return f"{how}{_quoted(self._words)}"

    def close(self) -> None:
        """Free what belongs to it. Idempotent. Kill it before."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for sock in (self._watch, self.sending, self.receiving):
                sock.close()
            for descriptor in (self.memory, self._words):
                os.close(descriptor)


class _Running:
    """A spawner that runs."""

    def __init__(self) -> None:
        if not sys.executable or getattr(sys, "frozen", False):
            raise TransportError(
                "gloo needs a process of its own, and sys.executable does not say which program is Python",
                hint="use another transport",
            )
        self.owner = os.getpid()
        self.words = os.memfd_create("netloader-gloo-stderr")
        self._control, theirs = _socket_pair()
        self._control.settimeout(_ASKING)
        path = os.pathsep.join(entry or os.curdir for entry in sys.path)
        try:
            with theirs:
                process = subprocess.Popen(  # noqa: S603 - our own program
                    [sys.executable, "-P", "-m", "netloader.transports.gloo.spawner", str(self.owner)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=self.words,
                    process_group=0,  # signals of a terminal go to the process that decides
                    env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
                )
        except OSError as error:
            self._control.close()
            os.close(self.words)
            raise TransportError(f"the process in which gloo runs can't be started: {error}") from error
        self._process = process
        self.end = weakref.finalize(self, _end, process, self._control, self.words, self.owner)

    def ended(self) -> bool:
        """Whether it has ended, or belongs to another process. It is no zombie afterwards."""
        return self.owner != os.getpid() or self._process.poll() is not None

    def ask(self, descriptors: list[int]) -> None:
        """Ask for the process of a session.

        Raises:
            OSError: It has ended, or does not take the request.
        """
        socket.send_fds(self._control, [b"session"], descriptors)


class Spawner:
    """Starts processes of sessions, by a process that has torch loaded and forks.

    That process is started with the first session, and ends by itself some time after the last one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: _Running | None = None

    def start(self) -> SessionProcess:
        """Start the process of a session. It takes milliseconds, or a second when torch has to be loaded first.

        It does not wait for that: what is sent to the process waits in its sockets.

        Raises:
            TransportError: It can't be started.
        """
        with self._lock:
            running = self._running
            if running is not None and running.owner == os.getpid():
                with suppress(OSError):  # it was idle for long, and has ended
                    return SessionProcess(running)
            self._running = running = _Running()
            try:
                return SessionProcess(running)
            except OSError as error:
                why = f"{error}{_quoted(running.words)}"
                raise TransportError(f"the process in which gloo runs can't be started: {why}") from error

    def reap(self) -> bool:
        """Wait for the process that forks if it has ended, so that it is no zombie. Does not block.

        Returns:
            Whether there is none now.
        """
        if not self._lock.acquire(blocking=False):
            return False  # a session is being started
        try:
            if self._running is not None and self._running.ended():
                self._running = None
            return self._running is None
        finally:
            self._lock.release()


def _end(process: subprocess.Popen[bytes], control: socket.socket, words: int, owner: int) -> None:
    """End a spawner, and with it the processes of its sessions."""
    control.close()
    os.close(words)
    if os.getpid() != owner:  # in a fork
        return
    if process.poll() is None:
        process.kill()
        with suppress(ChildProcessError):  # other code in this process waited for it
            os.waitpid(process.pid, 0)  # milliseconds, because it was killed
        process.returncode = -signal.SIGKILL


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _quoted(words: int) -> str:
    """The last line of a standard error, after a colon; empty if there is none."""
    try:
        size = os.fstat(words).st_size
        text = os.pread(words, _LAST_WORDS, max(0, size - _LAST_WORDS)).decode(errors="replace")
    except OSError:
        return ""  # closed meanwhile
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f": {shown(lines[-1], _LONGEST_LINE)}" if lines else ""
