"""Tensor parallel 2: each rank of a client pulls its shard from the same rank; other cuts of a model are refused."""

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
class Cast:
    """A server of two ranks that answers, and the hosts around it."""

    folder: Path
    full: Path
    bare: Path
    server: Engine
    answers: Any

    @property
    def files(self) -> list[Path]:
        return [self.folder / f"rank{rank}.txt" for rank in (0, 1)]


@pytest.fixture(scope="module")
def cast(models: ModelStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cast]:
    folder = tmp_path_factory.mktemp("ranks")
    full, bare = make_hosts(folder, models, "llama-bf16")
    with engines.engine(
        MODEL, folder / "server.log", folder=full, tensor_parallel=2, config={"OUTPUT_PREFIX": str(folder / "rank")}
    ) as server:
        server.wait_ready()
        yield Cast(folder, full, bare, server, server.answers(PROMPTS))


def test_two_ranks_pull_their_shards(cast: Cast) -> None:
    addresses = cast.server.wait_addresses(ranks=2)
    assert [file.read_text(encoding="ascii") for file in cast.files] == [addresses[0], addresses[1]]
    entries = [{"device_id": rank, "sources": [address]} for rank, address in addresses.items()]
    cast.server.stand_back()
    with engines.engine(
        MODEL,
        cast.folder / "client.log",
        folder=cast.bare,
        tensor_parallel=2,
        config={"SOURCE": entries, "FALLBACK": False},
    ) as client:
        client.wait_ready()
        for rank in (0, 1):
            assert client.lines(f"rank {rank}: target: pulled ")
        assert client.answers(PROMPTS) == cast.answers
        assert set(client.wait_addresses(ranks=2)) == {0, 1}


def test_one_rank_finds_no_whole_model_at_two(cast: Cast) -> None:
    """Half a model is refused by name; the files give what vLLM alone reads from them."""
    address = cast.server.addresses()[0]
    cast.server.stand_back()
    with (
        engines.engine(MODEL, cast.folder / "one.log", folder=cast.full, config=clients.source(address)) as one,
        engines.engine(MODEL, cast.folder / "plain.log", folder=cast.full, load_format="auto") as plain,
    ):
        engines.wait_all_ready(one, plain)
        (line,) = one.lines("the default loader (auto) loads the target")
        assert address in line
        assert "tp_size is '2' at the server and '1' at the client" in line
        assert not one.lines("target: pulled ")
        assert not plain.lines("netloader: rank 0")
        assert one.answers(PROMPTS) == plain.answers(PROMPTS)
        # What it read it offers, and to engines of its own kind only.
        assert clients.probe(one.wait_addresses()[0])["root"] != clients.probe(address)["root"]


def test_two_ranks_end_and_leave_no_addresses(cast: Cast) -> None:
    cast.server.stop()
    wait_for(lambda: not any(file.exists() for file in cast.files), 30, "the end of the address files")
    assert not any(listens(address) for address in cast.server.addresses().values())
