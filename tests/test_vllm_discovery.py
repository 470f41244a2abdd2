"""A worker's server in a registry, and how a rank finds the sources of its rank there. Without vLLM."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
import torch

from netloader import sync
from netloader.client.origin import work_of
from netloader.config import Config, load_config
from netloader.core.entries import Entry, decode_entry
from netloader.core.identity import ModelIdentity
from netloader.core.model_key import key_of
from netloader.discovery.configured import registries_of
from netloader.discovery.leases.backend import LeaseBackend
from netloader.discovery.leases.names import claim_prefix, lock_name
from netloader.discovery.memory import MemoryRegistry
from netloader.errors import AttemptFailed, ConfigError, NoSourceLeft, PeerLost, RefusedError
from netloader.tensors import hold
from netloader.vllm.early_check import _check
from netloader.vllm.load import choose_origin
from netloader.vllm.load import pull_together as module
from netloader.vllm.load.agree_ranks import Decision
from netloader.vllm.load.choose_origin import loads_from_storage
from netloader.vllm.load.find_sources import OfRank, find_sources
from netloader.vllm.load.inspect_engine import Context, Engine
from netloader.vllm.load.pull_weights import Pulled
from netloader.vllm.load.pulling import _options, patience, pull_raw
from netloader.vllm.model.agreement import Report, disagreement
from netloader.vllm.serve import serving

WAIT = 60.0
RANK = 3
IDENTITY = ModelIdentity(model="m", architecture="A", dtype="bfloat16", tp_size=4, tp_rank=RANK)
TENSORS = {"w": torch.arange(1 << 20, dtype=torch.uint8)}


@pytest.fixture(autouse=True)
def no_server_left() -> Iterator[None]:
    yield
    serving.stop_server()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config({"LISTEN_HOST": "127.0.0.1", "DISCOVERY": f"dir:{tmp_path}", "ZONE": "z"})


def until(condition: Callable[[], Any]) -> None:
    last = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < last
        time.sleep(0.02)


def entries(folder: Path) -> list[Entry]:
    found = []
    for file in folder.glob("*.json"):
        try:
            found.append(decode_entry(file.read_bytes()))
        except FileNotFoundError:
            continue  # withdrawn meanwhile
    return found


def offered(config: Config) -> serving.WorkerServer:
    server = serving.worker_server(config, RANK, "cpu")
    assert server is not None
    server.offer(hold(TENSORS, IDENTITY), "for a test")
    return server


def test_a_worker_is_published_while_it_serves(config: Config, tmp_path: Path) -> None:
    server = offered(config)
    until(lambda: entries(tmp_path))
    (entry,) = entries(tmp_path)
    assert (entry.address, entry.rank, entry.role, entry.key) == (server.address, RANK, "target", key_of(IDENTITY))
    assert entry.labels["zone"] == "z"
    server.pause(serving.ROLES, "the engine sleeps")
    until(lambda: not entries(tmp_path))
    server.resume("the engine wakes up")
    until(lambda: entries(tmp_path))
    assert entries(tmp_path)[0].generation != entry.generation
    server.stop()
    until(lambda: not entries(tmp_path))


def test_a_rank_finds_the_sources_of_its_rank_and_pulls_from_them(config: Config, tmp_path: Path) -> None:
    backend = registries_of(config)
    assert backend is not None
    mine = OfRank(backend, RANK)
    assert find_sources(mine, IDENTITY, RANK, wait=0.0, zone=None) == []
    found: list[str] = []
    searching = threading.Thread(
        target=lambda: found.extend(find_sources(mine, IDENTITY, RANK, wait=WAIT, zone=None)), name="netloader-test"
    )
    searching.start()
    server = offered(config)
    searching.join(WAIT)
    assert found == [server.address]
    for other, identity in (
        (OfRank(backend, RANK + 1), IDENTITY),
        (mine, msgspec.structs.replace(IDENTITY, tp_rank=0)),
    ):
        assert find_sources(other, identity, RANK, wait=0.0, zone=None) == []
    itself = OfRank(backend, RANK, server.own_addresses)
    assert find_sources(itself, IDENTITY, RANK, wait=0.0, zone=None) == []
    into = {"w": torch.zeros_like(TENSORS["w"])}
    report = pull_raw(into, IDENTITY, (), config, registry=mine)
    assert torch.equal(into["w"], TENSORS["w"])
    assert list(report.sources) == [server.address]


def test_a_registry_that_is_away_does_not_keep_a_worker_from_serving(tmp_path: Path) -> None:
    away = load_config({"LISTEN_HOST": "127.0.0.1", "DISCOVERY": f"dir:{tmp_path / 'away'}/"})
    server = offered(away)
    tensors, _ = sync.pull_new(sources=[server.address], layouts=("raw",))
    assert torch.equal(tensors["w"], TENSORS["w"])
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < WAIT / 10


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"DISCOVERY": "nothing:x"}, "DISCOVERY"),
        ({"DISCOVERY": "dir:relative"}, "DISCOVERY"),
        ({"DISCOVERY": ["dir:/a", "nothing:x"]}, r"DISCOVERY\[1\]"),
        ({"DISCOVERY": "dir:/a", "ORIGIN": "lease"}, "ORIGIN.*can't give a lease"),
        ({"ORIGIN": "lease"}, "ORIGIN.*there is no DISCOVERY"),
    ],
)
def test_a_wrong_registry_ends_the_start_by_name(fields: dict[str, Any], named: str) -> None:
    arguments = type("Arguments", (), {"load_format": "netloader", "model_loader_extra_config": fields})
    with pytest.raises(ConfigError, match=named):
        _check(arguments)


@pytest.fixture
def leases(monkeypatch: pytest.MonkeyPatch) -> LeaseBackend:
    """A registry that gives leases, for the event loop of one server."""
    backend = LeaseBackend(MemoryRegistry(), ttl=1.0)
    monkeypatch.setattr(serving, "registries_of", lambda _: backend)
    monkeypatch.setattr(choose_origin, "groups_of_this_engine", lambda **_: [])
    return backend


def test_an_engine_holds_the_lease_until_it_serves(leases: LeaseBackend, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = load_config({"LISTEN_HOST": "127.0.0.1", "DISCOVERY": "dir:/unused"})
    server = serving.worker_server(config, RANK, "cpu")
    assert server is not None

    mine = OfRank(leases, RANK)

    def ask(wait: float) -> str:
        return loads_from_storage(mine, server, IDENTITY, lambda: False, role="target", rank=RANK, wait=wait)

    assert "nobody holds it" in ask(0.0)
    assert "this engine loads the target from storage: nobody holds it" in caplog.text
    registry = leases._open
    assert isinstance(registry, MemoryRegistry)
    below = claim_prefix("netloader", work_of(key_of(IDENTITY)))
    assert [name for name in registry.names if name.startswith(below)]
    assert loads_from_storage(mine, server, IDENTITY, lambda: True, role="target", rank=RANK, wait=0.0) == "", (
        "SOURCE answers"
    )
    server.offer(hold(TENSORS, IDENTITY), "for a test")
    until(lambda: not server._turns)
    assert ask(0.0) == "", "it is served now"
    until(lambda: not registry.names.get(lock_name("netloader", work_of(key_of(IDENTITY)))))


def test_an_engine_without_a_server_does_not_ask(leases: LeaseBackend) -> None:
    why = loads_from_storage(leases, None, IDENTITY, lambda: False, role="target", rank=RANK, wait=0.0)
    assert "no server" in why


# --- again ------------------------------------------------------------------------------------------------------------


class Asked:
    """A load of which the first `failing` pulls fail. Everything but the loop is imitated."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        failing: int,
        storage: int,
        origin: str = "lease",
        left: bool = False,
        seconds: float = 0.0,
        final: bool = False,
    ) -> None:
        self.useless = frozenset[str]()
        self.pulls: list[object] = []
        self.asked = 0
        self.withdrawn = 0

        def pull(_context: Any, _built: Any, _model: Any, initial: object = None) -> Pulled:
            self.pulls.append(initial)
            failed = len(self.pulls) <= failing
            report = Report("failed" if failed else "pulled", 0, reason="gone" if failed else "", final=final)
            number = len(self.pulls)
            clock[0] += seconds
            lost = AttemptFailed("h:1", PeerLost("gone"), 1, f"generation {number}")
            busy = AttemptFailed("h:2", RefusedError("busy", "later"), 1, "busy one")
            error = NoSourceLeft([lost, busy]) if left and failed else None
            return Pulled(report, initial="first values", left=error)  # type: ignore[arg-type]

        clock = [1000.0]
        monkeypatch.setattr(module, "time", type("Clock", (), {"monotonic": staticmethod(lambda: clock[0])}))

        def ask(*_: Any, over: str, useless: frozenset[str], wait: float, **__: Any) -> str:
            self.asked += 1
            self.useless = useless
            if over:
                return over
            assert wait > 0
            return "nobody holds it" if self.asked == storage else ""

        def withdraw(*_: Any) -> None:
            self.withdrawn += 1

        def agree(_context: Any, pulled: Pulled) -> Decision:
            return Decision(pulled.own_report, (pulled.own_report,), disagreement([pulled.own_report]))

        for name, function in (
            ("pull", pull),
            ("loads_from_storage", ask),
            ("withdraw", withdraw),
            ("agree", agree),
        ):
            monkeypatch.setattr(module, name, function)
        config = load_config({"DISCOVERY": "etcd://h", "ORIGIN": origin, "WAIT": 10})
        engine = Engine(None, type("ModelConfig", (), {"runner_type": "generate"}), None)
        topology = type("Topology", (), {"rank": 0})
        registry = LeaseBackend(MemoryRegistry())
        self.context = Context(engine, config, topology, (), None, None, registry=registry)  # type: ignore[arg-type]

    def load(self) -> Decision:
        built = type("Built", (), {"identity": IDENTITY})
        return module.pull_together(self.context, built, None)[1]  # type: ignore[arg-type]


def test_after_a_pull_that_failed_it_is_asked_again_who_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, failing=2, storage=9)
    assert asked.load().keeps
    assert asked.pulls == [None, "first values", "first values"]
    assert asked.asked == asked.withdrawn == 2


def test_after_a_pull_that_failed_this_engine_may_be_the_next_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, failing=9, storage=2)
    decision = asked.load()
    assert not decision.keeps
    assert "nobody holds it" in decision.why_not
    assert len(asked.pulls) == 2


def test_it_is_asked_again_a_bounded_number_of_times_and_only_with_a_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, failing=99, storage=99)
    assert not asked.load().keeps
    assert len(asked.pulls) == 5
    alone = Asked(monkeypatch, failing=99, storage=99, origin="any")
    assert not alone.load().keeps
    assert (len(alone.pulls), alone.asked) == (1, 0)


def test_it_is_asked_again_until_the_time_is_over_without_lost_sources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Asked(monkeypatch, failing=99, storage=99, left=True, seconds=1.0)
    decision = asked.load()
    assert not decision.keeps
    assert len(asked.pulls) == 10
    assert "WAIT (10 s)" in decision.why_not
    assert asked.useless == {f"generation {number}" for number in range(1, 11)}


def test_a_rank_that_can_only_be_built_anew_ends_the_pulls(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, failing=99, storage=99, final=True)
    assert not asked.load().keeps
    assert (len(asked.pulls), asked.asked) == (1, 0)


@pytest.mark.parametrize("broken", ["claims", "sources"])
def test_a_registry_that_fails_costs_the_lease_and_the_ranks_are_told(
    broken: str, leases: LeaseBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise KeyError("a plugin's own error")

    server = serving.worker_server(load_config({"LISTEN_HOST": "127.0.0.1", "DISCOVERY": "dir:/unused"}), RANK, "cpu")
    monkeypatch.setattr(leases, broken, fails)
    why = loads_from_storage(leases, server, IDENTITY, lambda: False, role="target", rank=RANK, wait=0.0)
    assert why.endswith("asking for the lease failed")
    assert "unexpected error while asking who loads the model" in caplog.text


def test_a_registry_that_is_slow_costs_the_turn_and_not_the_server(
    leases: LeaseBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow:
        @contextlib.asynccontextmanager
        async def claim(self, *_: Any, **__: Any) -> AsyncIterator[None]:
            await anyio.sleep_forever()
            yield None

    monkeypatch.setattr(serving, "_LISTINGS", 0.2)
    monkeypatch.setattr(leases, "claims", Slow)
    server = serving.worker_server(load_config({"LISTEN_HOST": "127.0.0.1", "DISCOVERY": "dir:/unused"}), RANK, "cpu")
    assert server is not None
    why = loads_from_storage(leases, server, IDENTITY, lambda: False, role="target", rank=RANK, wait=0.0)
    assert "the registry did not say within 0.2 s who loads" in why
    assert server.running
    assert not server._turns
    server.offer(hold(TENSORS, IDENTITY), "for a test")
    tensors, _ = sync.pull_new(sources=[server.address], layouts=("raw",))
    assert torch.equal(tensors["w"], TENSORS["w"])


@pytest.mark.parametrize(
    ("leased", "spent", "expected"), [(False, 0.0, 600.0), (True, 0.0, 5.0), (True, 598.0, 2.0), (True, 700.0, 0.0)]
)
def test_with_a_lease_a_pull_does_not_wait_for_a_lost_origin(leased: bool, spent: float, expected: float) -> None:
    config = load_config({"WAIT": 600, "ORIGIN": "lease", "DISCOVERY": "etcd://h"})
    assert patience(config, spent, leased=leased) == expected
    assert _options((), config, spent, None, leased)["wait"] == expected
