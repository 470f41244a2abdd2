"""A real NPUWorker of vllm-ascend that serves on one simulated card, and one that pulls from it on another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.ascend.kinds import KINDS, Store
from tests.ascend.pulls import Digests, Instance, differences, settings

FromDisk = Callable[[str, int], list[Digests]]


@dataclass(frozen=True)
class Case:
    """One pull.

    Attributes:
        kind: The kind of model.
        transport: The setting.
        server: The server's other settings.
        ranks: Of each instance.
        arguments: Of both engines, besides those of the kind.
    """

    kind: str
    transport: str
    server: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 1
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.kind, self.transport, *(["ranks"] if self.ranks > 1 else [])])


DRAM = {"INT8_CACHE": "dram"}
CASES = [Case("llama", transport) for transport in ("tcp", "hccl")]
CASES += [Case("w8a8", transport, DRAM) for transport in ("tcp", "hccl")]
CASES += [
    Case("deepseek-w8a8", "hccl", DRAM),
    Case("mtp", "hccl", DRAM),
    Case("eagle", "hccl"),
    Case("moe-w8a8", "hccl", DRAM, 2, {"enable_expert_parallel": True}),
]


@pytest.fixture(scope="module")
def from_disk(store: Store, tmp_path_factory: pytest.TempPathFactory) -> FromDisk:
    """Loads a kind of model from its files, once for a case of that many ranks."""

    @functools.cache
    def load(case: int) -> list[Digests]:
        chosen = CASES[case]
        folder = tmp_path_factory.mktemp("disk") / "ranks"
        with Instance.on(_cards(chosen, 4), folder) as instance:
            return instance.load(store.get(KINDS[chosen.kind].model), _arguments(chosen, store))

    return lambda kind, ranks: load(next(n for n, case in enumerate(CASES) if (case.kind, case.ranks) == (kind, ranks)))


def _cards(case: Case, first: int) -> Sequence[int]:
    return range(first, first + case.ranks)


def _arguments(case: Case, store: Store) -> dict[str, Any]:
    return {**KINDS[case.kind].arguments(store), **case.arguments}


@dataclass(frozen=True)
class Pull:
    """What the two instances have, and the lines of the client."""

    seed: list[Digests]
    client: list[Digests]
    lines: Callable[..., list[list[str]]]


def pull(case: Case, store: Store, folder: Path, served: str = "") -> Pull:
    """Serve `served`, or the model of the case, and pull it into an instance that has no files."""
    model, arguments = KINDS[case.kind].model, _arguments(case, store)
    with (
        Instance.on(_cards(case, 0), folder / "seed") as seed,
        Instance.on(_cards(case, 2), folder / "client") as client,
    ):
        theirs = seed.load(store.get(served or model), arguments, settings(TRANSPORT=case.transport, **case.server))
        seed.profiled()
        sources = settings(seed.addresses(), TRANSPORT=case.transport, SERVE=False)
        ours = client.load(store.bare(model), arguments, sources)
        client.profiled()
        return Pull(theirs, ours, client.lines)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_pull_ends_in_the_model_of_a_disk_load(store: Store, from_disk: FromDisk, tmp_path: Path, case: Case) -> None:
    found, disk = pull(case, store, tmp_path), from_disk(case.kind, case.ranks)
    assert not differences(found.client, disk)
    assert not differences(found.seed, disk)
    for lines in found.lines("target: pulled", f"over {case.transport}"):
        assert len(lines) == 1


def test_other_weights_at_the_seed_are_noticed(store: Store, from_disk: FromDisk, tmp_path: Path) -> None:
    """Control for the comparison: nothing says which weights are meant, and the names of all tensors are equal."""
    case = CASES[3]
    found = pull(case, store, tmp_path, served="w8a8-other")
    assert not differences(found.client, found.seed)
    names = differences(found.client, from_disk(case.kind, case.ranks))
    projection = "target model.layers.0.self_attn.qkv_proj"
    assert {f"rank 0: {stage} {projection}.weight" for stage in ("raw", "final")} <= set(names)
    assert f"rank 0: final {projection}.weight_scale" in names
