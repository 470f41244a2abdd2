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
NO_COPIES: Mapping[str, Any] = {"INT8_CACHE": "no", "KEEP_RAW": False}
BY_REFERENCE = {"llama", "eagle", "qwen3-moe", "deepseek"}
"""Kinds whose raw tensors all survive post-processing: a server needs no copies."""

CASES = [Case(kind, "hccl", {} if kind in BY_REFERENCE else DRAM) for kind in KINDS]
CASES += [
    Case("llama", "tcp"),
    Case("w8a8", "tcp", DRAM),
    Case("w4a8", "hccl", HBM),
    Case("moe-w8a8", "hccl", DRAM, 2, {"enable_expert_parallel": True}),
]
COMPUTED = (
    "qwen3-moe",
    "deepseek",
    "w8a8",
    "w8a8-dynamic",
    "w8a16",
    "w8a8-mix",
    "moe-w8a8",
    "compressed-tensors",
    "deepseek-w8a8",
    "mtp",
)
"""Kinds whose raw tensors are all computed from processed ones: a server needs no copies."""

CASES += [Case(kind, "hccl", NO_COPIES) for kind in COMPUTED]
CASES += [
    Case("w8a8", "tcp", NO_COPIES),
    Case("qwen3-moe", "tcp", NO_COPIES),
    Case("moe-w8a8", "hccl", NO_COPIES, 2, {"enable_expert_parallel": True}),
    Case("qwen3-moe", "hccl", NO_COPIES, 2, {"enable_expert_parallel": True}),
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


@pytest.mark.parametrize("kind", COMPUTED)
def test_what_is_computed_needs_no_originals(store: Store, tmp_path: Path, kind: str) -> None:
    """Only tensors of up to 4096 bytes are copied, by whatever settings."""
    with Instance.on([0], tmp_path / "seed") as seed:
        chosen = KINDS[kind]
        seed.load(store.get(chosen.model), chosen.arguments(store.get), settings(TRANSPORT="hccl", **NO_COPIES))
        seed.profiled()
        (lines,) = seed.lines("serves target", "computed from processed ones")
        assert len(lines) == 1, seed.engines[0].text()
        kept = lines[0].partition("originals kept: ")[2]
        assert not kept or kept.startswith("a few bytes each: ")
        assert "; " not in kept


def test_four_bit_weights_need_copies_of_their_second_scales_only(
    store: Store, from_disk: FromDisk, tmp_path: Path
) -> None:
    listed = [
        f"model.layers.{layer}.{name}.weight_scale_second"
        for layer in range(4)
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]
    case = Case("w4a8", "hccl", {"INT8_CACHE": "dram", "INT8_CACHE_NAME": listed, "KEEP_RAW": False})
    found = pull(case, store, tmp_path)
    assert not differences(found.client, from_disk("w4a8", 1))


def test_what_is_lost_is_named_without_copies(store: Store, tmp_path: Path) -> None:
    with Instance.on([0], tmp_path / "seed") as seed:
        seed.load(store.get("w4a8"), {}, settings(TRANSPORT="hccl", **NO_COPIES))
        seed.profiled()
        (lines,) = seed.lines("does not serve its target", "weight_scale_second (vLLM replaced it)")
        assert len(lines) == 1, seed.engines[0].text()
        assert "left 8 raw tensors behind" in lines[0], "the weights are computed"
        assert "set INT8_CACHE to dram or hbm on the server" in lines[0]
