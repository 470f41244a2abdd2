"""Servers and clients in separate processes, as handles for tests."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import Process
from anyio.streams.text import TextReceiveStream

from tests.preloaded import PYTHON

PATIENCE = 60.0
HERE = Path(__file__).parents[2]


class Peer:
    """One process that runs :mod:`tests.drivers.peer_main`."""

    def __init__(self, process: Process) -> None:
        self.process = process
        if process.stdout is None or process.stdin is None:
            raise RuntimeError("the process has no pipes")
        self._out = TextReceiveStream(process.stdout)
        self._in = process.stdin
        self._ahead = ""

    async def hear(self) -> dict[str, Any]:
        """The next line of its output, decoded."""
        with anyio.fail_after(PATIENCE):
            while "\n" not in self._ahead:
                self._ahead += await self._out.receive()
        line, self._ahead = self._ahead.split("\n", 1)
        heard: dict[str, Any] = json.loads(line)
        return heard

    async def ask(self, command: str) -> dict[str, Any]:
        await self._in.send(command.encode() + b"\n")
        return await self.hear()

    async def until(self, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Poll its status until it fulfils `condition`; return that status."""
        with anyio.fail_after(PATIENCE):
            while True:
                seen = await self.ask("look")
                if condition(seen):
                    return seen
                await anyio.sleep(0.02)

    async def pull(self) -> float:
        """Have a client of the role `pulls` pull once more and check the bytes; the seconds of the pull."""
        await self._in.send(b"pull\n")
        outcome = await self.outcome()
        if not outcome.get("right"):
            raise AssertionError(f"the pull failed, or brought other bytes: {outcome}")
        seconds: float = outcome["seconds"]
        return seconds

    async def outcome(self) -> dict[str, Any]:
        """The final line of a client."""
        while True:
            heard = await self.hear()
            if "done" in heard or "failed" in heard:
                return heard

    async def finish(self) -> int:
        """Close its stdin, and wait until it has ended."""
        await self._in.aclose()
        with anyio.fail_after(PATIENCE):
            return await self.process.wait()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@asynccontextmanager
async def peer(role: str, **options: Any) -> AsyncIterator[Peer]:
    """A process of the given role; killed on exit if it still runs."""
    command = [PYTHON, "-m", "tests.drivers.peer_main", role, json.dumps(options)]
    process = await anyio.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None, cwd=HERE)
    try:
        yield Peer(process)
    finally:
        if process.returncode is None:
            process.kill()
        with anyio.CancelScope(shield=True):
            await process.wait()
            await process.aclose()
