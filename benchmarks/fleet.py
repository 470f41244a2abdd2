"""Replicas on hosts with shaped links, as the fan-out and the striping benchmark use them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.hosts import Host

__all__ = ["Replica", "replicas"]

_LONGEST = 900.0


class Replica:
    """One process of ``benchmarks.replica`` on one host."""

    def __init__(self, host: Host, *args: str) -> None:
        self.host = host
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            host.command(sys.executable, "-m", "benchmarks.replica", *args),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._buffer = b""
        self.port = int(self.hear("ready")["port"])

    @property
    def address(self) -> str:
        """The address at which it serves."""
        return f"{self.host.address}:{self.port}"

    def order(self, **fields: Any) -> None:
        """Send it a command."""
        if self.process.stdin is None:
            raise RuntimeError("the replica has no standard input")
        self.process.stdin.write(json.dumps(fields).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, *keys: str) -> dict[str, Any]:
        """Return its next line that has one of `keys`.

        Raises:
            RuntimeError: It ended, or printed no such line in time.
        """
        while True:
            line, newline, rest = self._buffer.partition(b"\n")
            if newline:
                self._buffer = rest
                said: dict[str, Any] = json.loads(line)
                if any(key in said for key in keys):
                    return said
                continue
            if self.process.stdout is None or not select.select([self.process.stdout], [], [], _LONGEST)[0]:
                raise RuntimeError(f"{self.host.name} says nothing")
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                raise RuntimeError(f"{self.host.name} ended with status {self.process.wait()}")
            self._buffer += data

    def kill(self) -> None:
        """Kill it, as in a crash. `ip netns exec` replaces itself, so the process is the replica's own."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """Stop it regularly."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.kill()


@contextmanager
def replicas(on: list[Host], *args: str) -> Iterator[list[Replica]]:
    """A replica on each host."""
    with contextlib.ExitStack() as stack:
        made = []
        for host in on:
            replica = Replica(host, *args)
            stack.callback(replica.close)
            made.append(replica)
        yield made
