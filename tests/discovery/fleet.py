"""A fleet on one machine: server processes, each host a loopback address, and clients that find them."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import torch
from anyio.abc import Process

import netloader
from netloader.observe.events import Event, SourceChosen
from tests.preloaded import PYTHON

__all__ = ["Client", "Fleet", "a_fleet", "identity", "weights"]

PATIENCE = 60.0


def weights(seed: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {f"layer.{n}.weight": torch.randn(64, 64, generator=made) for n in range(4)}


def identity(seed: int) -> netloader.ModelIdentity:
    """Of the weights of this seed: one architecture, so one key, and a fingerprint of its own."""
    return netloader.ModelIdentity(model="m", architecture="A", dtype="float32", fingerprint=f"{seed:032x}")


class Fleet:
    """Processes that serve. A process has one host or several.

    Args:
        port: Of every server.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._processes: list[Process] = []

    async def start(self, hosts: Sequence[str], discovery: str | None, *, seed: int = 0) -> Process:
        """A process with a server at each of `hosts`, once they serve."""
        options = {"hosts": list(hosts), "port": self._port, "seed": seed, "discovery": discovery}
        process = await anyio.open_process(
            [PYTHON, "-m", "tests.discovery.fleet_main", json.dumps(options)],
            cwd=Path(__file__).parents[2],
            stderr=None,
        )
        self._processes.append(process)
        assert process.stdout is not None
        with anyio.fail_after(PATIENCE):
            said = await process.stdout.receive()
        assert said == b"ready\n", said
        return process

    async def kill(self, process: Process) -> None:
        process.kill()
        await process.wait()

    async def stop(self) -> None:
        with anyio.CancelScope(shield=True):
            for process in self._processes:
                if process.returncode is None:
                    process.kill()
            for process in self._processes:
                await process.wait()
                await process.aclose()


@asynccontextmanager
async def a_fleet(port: int) -> AsyncIterator[Fleet]:
    fleet = Fleet(port)
    try:
        yield fleet
    finally:
        await fleet.stop()


class Client:
    """Pulls the weights of a seed once.

    Attributes:
        order: The addresses that it connected to.
        report: Of the pull, once it is done.
        tensors: What it has pulled.
    """

    def __init__(self, seed: int = 0) -> None:
        self.order: list[str] = []
        self.report: netloader.PullReport | None = None
        self.tensors = {name: torch.zeros_like(tensor) for name, tensor in weights(seed).items()}
        self._seed = seed

    async def pull(self, discovery: object, *, sources: Sequence[str] = (), wait: float = PATIENCE) -> None:
        self.report = await netloader.pull(
            self.tensors,
            identity(self._seed),
            sources=list(sources),
            discovery=discovery,  # type: ignore[arg-type]
            wait=wait,
            timeout=wait + PATIENCE,
            observers=[self._note],
        )

    def _note(self, event: Event) -> None:
        if isinstance(event, SourceChosen):
            self.order.append(event.source)

    @property
    def chosen(self) -> Counter[str]:
        """How often it connected to each address."""
        return Counter(self.order)

    @property
    def exact(self) -> bool:
        return all(torch.equal(tensor, self.tensors[name]) for name, tensor in weights(self._seed).items())


def suspend(process: Process) -> None:
    """Its kernel goes on accepting connections; it answers nothing."""
    process.send_signal(signal.SIGSTOP)


def go_on(process: Process) -> None:
    process.send_signal(signal.SIGCONT)
