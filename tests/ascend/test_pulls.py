"""A real NPUWorker of vllm-ascend that serves on one simulated card, and one that pulls from it on another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.ascend.kinds import KINDS, Find, Store
from tests.ascend.pulls import Digests, Instance, differences, settings

FromDisk = Callable[[str, int], Sequence[Digests]]


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
        more = [*map(str, self.server.values()), *(["ranks"] if self.ranks > 1 else [])]
        return "-".join([self.kind, self.transport, *more])


DRAM, HBM = {"INT8_CACHE": "dram"}, {"INT8_CACHE": "hbm"}
BY_REFERENCE = {"llama", "eagle", "qwen3-moe", "deepseek"}
"""Kinds whose raw tensors all survive post-processing: a server needs no copies."""

CASES = [Case(kind, "hccl", {} if kind in BY_REFERENCE else DRAM) for kind in KINDS]
CASES += [
    Case("llama", "tcp"),
    Case("w8a8", "tcp", DRAM),
    Case("w4a8", "hccl", HBM),
    Case("moe-w8a8", "hccl", DRAM, 2, {"enable_expert_parallel": True}),
]


@pytest.fixture(scope="module")
def from_disk(store: Store, tmp_path_factory: pytest.TempPathFactory) -> FromDisk:
    """Loads a kind of model from its files, once for a case of that many ranks."""

    @functools.cache
    def load(case: int) -> Sequence[Digests]:
        chosen = CASES[case]
        folder = tmp_path_factory.mktemp("disk") / "ranks"
        with Instance.on(_cards(chosen, 4), folder) as instance:
            return instance.load(store.get(KINDS[chosen.kind].model), _arguments(chosen, store.get))

    return lambda kind, ranks: load(next(n for n, case in enumerate(CASES) if (case.kind, case.ranks) == (kind, ranks)))


def _cards(case: Case, first: int) -> Sequence[int]:
    return range(first, first + case.ranks)


def _arguments(case: Case, find: Find) -> dict[str, Any]:
    return {**KINDS[case.kind].arguments(find), **case.arguments}


@dataclass(frozen=True)
class Pull:
    """What the two instances have, and the lines of the client."""

    seed: Sequence[Digests]
    client: Sequence[Digests]
    lines: Callable[..., list[list[str]]]


def pull(case: Case, store: Store, folder: Path, served: str = "") -> Pull:
    """Serve `served`, or the model of the case, and pull it into an instance that has no files."""
    model = KINDS[case.kind].model
    with (
        Instance.on(_cards(case, 0), folder / "seed") as seed,
        Instance.on(_cards(case, 2), folder / "client") as client,
    ):
        serving = settings(TRANSPORT=case.transport, **case.server)
        theirs = seed.load(store.get(served or model), _arguments(case, store.get), serving)
        seed.profiled()
        sources = settings(seed.addresses(), TRANSPORT=case.transport, SERVE=False)
        ours = client.load(store.bare(model), _arguments(case, store.bare), sources)
        client.profiled()
        return Pull(theirs, ours, client.lines)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_pull_ends_in_the_model_of_a_disk_load(store: Store, from_disk: FromDisk, tmp_path: Path, case: Case) -> None:
    found, disk = pull(case, store, tmp_path), from_disk(case.kind, case.ranks)
    assert not differences(found.client, disk)
    assert not differences(found.seed, disk)
    for role in disk[0]["raw"]:
        for lines in found.lines(f"{role}: pulled", f"over {case.transport}"):
            assert len(lines) == 1


def test_other_weights_at_the_seed_are_noticed(store: Store, from_disk: FromDisk, tmp_path: Path) -> None:
    """Control for the comparison: nothing says which weights are meant, and the names of all tensors are equal."""
    case = Case("w8a8", "hccl", DRAM)
    found = pull(case, store, tmp_path, served="w8a8-other")
    assert not differences(found.client, found.seed)
    names = differences(found.client, from_disk(case.kind, case.ranks))
    projection = "target model.layers.0.self_attn.qkv_proj"
    assert {f"rank 0: {stage} {projection}.weight" for stage in ("raw", "final")} <= set(names)
    assert f"rank 0: final {projection}.weight_scale" in names


def test_what_post_processing_replaces_is_not_served_without_copies(store: Store, tmp_path: Path) -> None:
    with Instance.on([0], tmp_path / "seed") as seed:
        seed.load(store.get("w8a8"), {}, settings(TRANSPORT="hccl", INT8_CACHE="no"))
        seed.profiled()
        (lines,) = seed.lines("does not serve its target", "self_attn.qkv_proj.weight (vLLM replaced it)")
        assert len(lines) == 1, seed.engines[0].text()
        assert "set INT8_CACHE to dram or hbm on the server" in lines[0]
