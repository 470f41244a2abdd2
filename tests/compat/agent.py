"""Serves and pulls with whichever netloader is on its path, as it is told by JSON lines. Ends when they end.

The text of this file is run by releases that know nothing of this one (`tests.compat.agents`), so it uses what is
public in all of them, and imports nothing of the tests.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from functools import partial
from importlib.metadata import entry_points
from typing import Any

import anyio
import anyio.to_thread
import torch

import netloader
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport, Side

HOST = "127.0.0.1"
MIB = 1 << 20
SIZES = {"a": 2 * MIB, "b": 3 * MIB + 17, "c": 5}
IDENTITY = netloader.ModelIdentity(model="compat", dtype="uint8")


def weights() -> dict[str, torch.Tensor]:
    made = {name: hashlib.shake_128(name.encode()).digest(size) for name, size in SIZES.items()}
    return {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in made.items()}


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(tensors[name].numpy().tobytes())
    return found.hexdigest()


def transport(name: str, hold: int | None) -> Any:
    """The one that is registered under `name`; with `hold`, it sends nothing after that block."""
    (entry,) = entry_points(group="netloader.transports", name=name)
    made = entry.load()()
    if hold is None:
        return made
    return FaultyTransport(made, Faults([Fault(FaultKind.HOLD, hold, side=Side.SEND, times=None)]))


class Agent:
    """What one process does at once."""

    def __init__(self, tasks: Any) -> None:
        self._tasks = tasks
        self._stops: list[anyio.Event] = []
        self._verified: dict[str, int] = {}
        self._moved = anyio.Event()
        self._results: dict[str, dict[str, Any]] = {}

    async def serve(self, name: str, token: str | None = None, hold: int | None = None, **options: Any) -> Any:
        """Serve the weights."""
        carrier = transport(options.pop("transport"), hold)
        return await self._running(weights(), carrier, token, options)

    async def pull(self, name: str, sources: list[str], token: str | None, transport_name: str, relay: bool) -> Any:
        """Begin to pull, and, with `relay`, to pass on."""
        self._verified[name] = 0
        told, server = {}, None
        if relay:
            told, server = await self._running(None, transport(transport_name, None), token, {})
        self._tasks.start_soon(self._pull, name, sources, token, transport_name, server)
        return told

    async def progress(self, name: str, nbytes: int) -> Any:
        """Wait until a pull has verified so much."""
        while self._verified[name] < nbytes and name not in self._results:
            await self._moved.wait()
        return {"verified": self._verified[name]}

    async def result(self, name: str) -> Any:
        """Wait for the end of a pull; its name is free again then."""
        while name not in self._results:
            await self._moved.wait()
        return self._results.pop(name)

    async def stop(self) -> Any:
        """Stop all servers."""
        while self._stops:
            self._stops.pop().set()
        return {}

    async def _running(self, tensors: Any, carrier: Any, token: str | None, options: dict[str, Any]) -> Any:
        stop, started = anyio.Event(), anyio.Event()
        found: list[Any] = []

        async def run() -> None:
            secret = None if token is None else token.encode()
            identity = None if tensors is None else IDENTITY
            async with netloader.Server(
                tensors, identity, host=HOST, transport=carrier, token=secret, **options
            ) as server:
                found.append(server)
                started.set()
                await stop.wait()

        self._tasks.start_soon(run)
        self._stops.append(stop)
        await started.wait()
        return {"address": f"{HOST}:{found[0].port}"}, found[0]

    async def _pull(self, name: str, sources: list[str], token: str | None, transport_name: str, relay: Any) -> None:
        into = {key: torch.zeros_like(tensor) for key, tensor in weights().items()}
        try:
            report = await netloader.pull(
                into,
                IDENTITY,
                sources=sources,
                transport=transport_name,
                token=None if token is None else token.encode(),
                stripe=1,
                progress=partial(self._move, name),
                relay=relay,
            )
        except netloader.NetloaderError as error:
            self._results[name] = {"failed": str(error)}
        else:
            blocks = {source: share.blocks for source, share in report.sources.items()}
            transports = sorted({share.transport for share in report.sources.values() if share.blocks})
            self._results[name] = {"digest": digest(into), "blocks": blocks, "transports": transports}
        self._wake()

    def _move(self, name: str, step: netloader.Progress) -> None:
        self._verified[name] = step.verified
        self._wake()

    def _wake(self) -> None:
        moved, self._moved = self._moved, anyio.Event()
        moved.set()


def say(what: Mapping[str, Any]) -> None:
    print(json.dumps(what), flush=True)


async def main() -> None:
    say({"file": netloader.__file__, "digest": digest(weights())})
    async with anyio.create_task_group() as tasks:
        agent = Agent(tasks)
        while line := await anyio.to_thread.run_sync(sys.stdin.readline):
            command, arguments = json.loads(line)
            answer = await getattr(agent, command)(**arguments)
            say(answer[0] if isinstance(answer, tuple) else answer)
        tasks.cancel_scope.cancel()


if __name__ == "__main__":
    anyio.run(main)
