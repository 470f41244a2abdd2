"""Tensor parallel 2: each rank of a client pulls its shard from the same rank; other parallel sizes are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import clients, engines
from tests.e2e.engines import Engine, wait_for
from tests.e2e.hosts import MODEL, listens, make_hosts
from tests.models import PROMPTS, ModelStore

pytestmark = [pytest.mark.slow, pytest.mark.in_order]


@dataclass(frozen=True)
class Engines:
    """A server of two ranks that answers requests, and the hosts."""

    folder: Path
    full: Path
    bare: Path
    server: Engine
    answers: Any

    @property
    def files(self) -> list[Path]:
        return [self.folder / f"rank{rank}.txt" for rank in (0, 1)]


@pytest.fixture(scope="module")
def scenario(models: ModelStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("ranks")
    full, bare = make_hosts(folder, models, "llama-bf16")
    with engines.engine(
        MODEL, folder / "server.log", folder=full, tensor_parallel=2, config={"OUTPUT_PREFIX": str(folder / "rank")}
    ) as server:
        server.wait_ready()
        yield Engines(folder, full, bare, server, server.answers(PROMPTS))


def test_two_ranks_pull_their_shards(scenario: Engines) -> None:
    addresses = scenario.server.wait_addresses(ranks=2)
    assert [file.read_text(encoding="ascii") for file in scenario.files] == [addresses[0], addresses[1]]
    entries = [{"device_id": rank, "sources": [address]} for rank, address in addresses.items()]
    scenario.server.stand_back()
    with engines.engine(
        MODEL,
        scenario.folder / "client.log",
        folder=scenario.bare,
        tensor_parallel=2,
        config={"SOURCE": entries, "FALLBACK": False},
    ) as client:
        client.wait_ready()
        for rank in (0, 1):
            assert client.lines(f"rank {rank}: target: pulled ")
        assert client.answers(PROMPTS) == scenario.answers
        assert set(client.wait_addresses(ranks=2)) == {0, 1}


def test_a_client_with_one_rank_is_refused_by_a_server_with_two(scenario: Engines) -> None:
    """Half a model is refused by name; the fallback gives the same answers as vLLM alone."""
    address = scenario.server.addresses()[0]
    scenario.server.stand_back()
    with (
        engines.engine(MODEL, scenario.folder / "one.log", folder=scenario.full, config=clients.source(address)) as one,
        engines.engine(MODEL, scenario.folder / "plain.log", folder=scenario.full, load_format="auto") as plain,
    ):
        engines.wait_all_ready(one, plain)
        (line,) = one.lines("the default loader (auto) loads the target")
        assert address in line
        assert "tp_size is '2' at the server and '1' at the client" in line
        assert not one.lines("target: pulled ")
        assert not plain.lines("netloader: rank 0")
        assert one.answers(PROMPTS) == plain.answers(PROMPTS)
        # It offers what it read, to engines of the same parallel sizes only.
        assert clients.probe(one.wait_addresses()[0])["root"] != clients.probe(address)["root"]


def test_two_ranks_stop_and_remove_their_address_files(scenario: Engines) -> None:
    scenario.server.stop()
    wait_for(lambda: not any(file.exists() for file in scenario.files), 30, "the end of the address files")
    assert not any(listens(address) for address in scenario.server.addresses().values())
