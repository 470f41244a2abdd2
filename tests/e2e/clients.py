"""Library clients for scenarios with engines: pulls in threads, and a server of pulled weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netloader import sync
from netloader.errors import NetloaderError
from netloader.transports.faults import Faults, FaultyTransport
from netloader.transports.gloo import GlooTransport
from tests.e2e.engines import Engine

if TYPE_CHECKING:
    import torch

    from netloader.core.identity import ModelIdentity, Role
    from netloader.core.report import Progress, PullReport

PULL_TIMEOUT = 240.0
STALL_TIMEOUT = 120.0


@dataclass(frozen=True)
class Weights:
    """The weights that a library client pulled from an engine."""

    tensors: Mapping[str, torch.Tensor]
    report: PullReport

    @property
    def identity(self) -> ModelIdentity:
        return self.report.identity

    def equal(self, other: Mapping[str, torch.Tensor]) -> bool:
        """Whether names, dtypes, shapes and bytes are the same."""
        import torch

        def same(one: torch.Tensor, two: torch.Tensor) -> bool:
            alike = one.dtype == two.dtype and one.shape == two.shape
            return alike and torch.equal(_bytes(one), _bytes(two))

        return list(self.tensors) == list(other) and all(same(t, other[name]) for name, t in self.tensors.items())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


def pull_all(*sources: str, role: Role = "target") -> Weights:
    """Pull the raw tensors of an engine's model into new memory."""
    tensors, report = sync.pull_new(sources=list(sources), role=role, layouts=("raw",), timeout=PULL_TIMEOUT)
    return Weights(tensors, report)


@contextmanager
def late_server(weights: Weights) -> Iterator[tuple[sync.SyncServer, threading.Event]]:
    """A library server that says "not ready" until the event is set, and then serves `weights`."""
    ready = threading.Event()
    over = threading.Event()

    def hold() -> None:
        ready.wait()
        if not over.is_set():
            server.hold(weights.tensors, weights.identity)

    with sync.serve(None, host="127.0.0.1") as server:
        expect = server._server.expect
        server._portal.call(lambda: expect("target", "raw", reason="held back", retry_after=0.2))
        thread = threading.Thread(target=hold, name="late-server")
        thread.start()
        try:
            yield server, ready
        finally:
            over.set()
            ready.set()
            thread.join()


def held_transport() -> FaultyTransport:
    """The transport `held` of the test plugin, for a process without injected faults."""
    return FaultyTransport(GlooTransport(), Faults(), name="held")


@dataclass
class LibraryPull:
    """A pull in a thread, into memory of the same names and shapes as `like`, from one source after the other."""

    like: Weights
    sources: Sequence[str]
    transport: Any = ("auto",)
    wait: float = 0.0
    progress: list[Progress] = field(default_factory=list)
    report: PullReport | None = None
    error: NetloaderError | None = None

    def __enter__(self) -> LibraryPull:
        import torch

        self.tensors = {name: torch.zeros_like(tensor) for name, tensor in self.like.tensors.items()}
        self._thread = threading.Thread(target=self._run, name="library-pull")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    @property
    def in_the_middle(self) -> bool:
        """Whether some blocks are verified, but not all."""
        return self._thread.is_alive() and bool(self.progress) and self.progress[-1].verified < self.progress[-1].total

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    @property
    def complete(self) -> bool:
        """Whether it ended with every byte in place."""
        return self.over and self.report is not None and self.like.equal(self.tensors)

    def _run(self) -> None:
        try:
            self.report = sync.pull(
                self.tensors,
                self.like.identity,
                sources=list(self.sources),
                transport=list(self.transport),
                timeout=PULL_TIMEOUT,
                wait=self.wait,
                stall_timeout=STALL_TIMEOUT,
                progress=self.progress.append,
                stripe=1,
                follow=False,
            )
        except NetloaderError as error:
            self.error = error


def probe(address: str) -> dict[str, Any]:
    """What `netloader probe` says about a source."""
    command = [str(Path(sys.executable).with_name("netloader")), "probe", "--json", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def source(*addresses: str, rank: int = 0) -> dict[str, Any]:
    """The field SOURCE for one rank."""
    return {"SOURCE": [{"device_id": rank, "sources": list(addresses)}]}


def given(engine: Engine, address: str) -> int:
    """Number of blocks that came from a source, by the log of an engine at debug level."""
    (line,) = engine.lines(f"target: source {address}: ")
    found = re.search(r": (\d+) blocks?,", line)
    assert found is not None
    return int(found[1])
