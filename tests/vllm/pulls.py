"""Seeds and clients in one process: models that are loaded once and served by many tests, and pulls into new models.

A seed is a model that this library's loader has filled and offered. Its holding is taken out of the process's server,
so that a test can serve it with faults or under another identity. Blocks go over the in-process transport.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from netloader import sync
from netloader.session.holding import Holding
from netloader.transports import registry
from netloader.transports.faults import Fault, Faults, FaultyTransport
from netloader.vllm.serve import serving
from tests.models import ModelStore, change_weight
from tests.vllm import harness

NAME = "tiny"
TRANSPORT = "memory"
DRAFT = {"method": "draft_model", "num_speculative_tokens": 3}


@dataclass
class Seed:
    """A model that can be served, and the raw digests of a disk load of the same files."""

    loaded: harness.Loaded
    holding: Holding
    disk: dict[str, str]


@dataclass
class Seeds:
    """Loads each seed once."""

    models: ModelStore
    folder: Path
    _made: dict[object, Seed] = field(default_factory=dict)
    _disk: dict[str, dict[str, str]] = field(default_factory=dict)

    def disk(self, kind: str) -> dict[str, str]:
        """Raw digests of a disk load, by vLLM's own loader."""
        if kind not in self._disk:
            self._disk[kind] = harness.load(harness.engine_config(self.models.get(kind))).raw
        return self._disk[kind]

    def get(self, kind: str, **extra: Any) -> Seed:
        """The seed of a kind of model, loaded with these settings in addition to the usual ones."""
        key = (kind, *sorted(extra.items()))
        if key not in self._made:
            loaded, holding = offered(self.models.get(kind), extra)
            self._made[key] = Seed(loaded, holding, self.disk(kind))
        return self._made[key]

    def changed(self, kind: str, name: str, **extra: Any) -> Seed:
        """A seed whose weight `name` differs from that of `kind`, with the raw digests of a disk load of `kind`."""
        folder = self.folder / f"{kind}-{name}"
        if not folder.exists():
            change_weight(self.models.get(kind), folder, name)
        loaded, holding = offered(folder, extra)
        return Seed(loaded, holding, self.disk(kind))


def offered(
    model: Path, settings: Mapping[str, Any], arguments: Mapping[str, Any] | None = None
) -> tuple[harness.Loaded, Holding]:
    """Load `model` as a server does, take its holding out of the server, and end the server."""
    loaded = load(model, arguments=arguments, **settings)
    server = serving.running_server()
    if server is None:
        raise AssertionError("the load opened no server")
    (holding,) = server._server.holdings.held()
    serving.stop_server()
    return loaded, holding


def extra(sources: Sequence[str] = (), **settings: Any) -> dict[str, Any]:
    """Settings for a load over the in-process transport, with `sources` for rank 0."""
    usual: dict[str, Any] = {"MODEL": NAME, "TRANSPORT": TRANSPORT}
    if sources:
        usual["SOURCE"] = [{"device_id": 0, "sources": list(sources)}]
    return {**usual, **settings}


def load(model: Path, *sources: str, arguments: Mapping[str, Any] | None = None, **settings: Any) -> harness.Loaded:
    """Load `model` with this library's loader, as a server."""
    config = harness.engine_config(
        model, load_format="netloader", extra=extra(sources, **settings), **(arguments or {})
    )
    return harness.load(config)


def pull(model: Path, *sources: str, **settings: Any) -> harness.Loaded:
    """Load `model` with this library's loader from `sources`, without serving it."""
    return load(model, *sources, **{"SERVE": False, **settings})


@contextmanager
def source_of(holding: Holding, *faults: Fault, token: bytes | None = None, **identity: Any) -> Iterator[str]:
    """Serve a holding, with these changes of its identity and these faults of the transport. Yields the address."""
    transport = registry.load(TRANSPORT)
    announcement = holding.announcement
    changed = replace(announcement, identity=msgspec.structs.replace(announcement.identity, **identity))
    served = _Served(changed, holding.device, holding.memory)
    wanted = FaultyTransport(transport, Faults(faults)) if faults else transport
    with sync.serve(None, host="127.0.0.1", transport=wanted, token=token) as server:
        server._portal.call(server._server.add, served)
        yield server.address


@dataclass(frozen=True)
class _Served:
    announcement: Any
    device: str
    memory: Any


class LogLines(logging.Handler):
    """The lines that this library logs, at INFO and above."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def with_part(self, *parts: str) -> list[str]:
        """The lines that contain every one of `parts`."""
        return [line for line in self.lines if all(part in line for part in parts)]

    def one(self, *parts: str) -> str:
        """The only line that contains every one of `parts`."""
        found = self.with_part(*parts)
        if len(found) != 1:
            raise AssertionError(f"{len(found)} lines with {parts} among:\n" + "\n".join(self.lines))
        return found[0]
