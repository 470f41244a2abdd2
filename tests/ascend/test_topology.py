"""Which `device_id` of SOURCE is which rank, for engines that several `vllm serve` commands start together.

The commands' configuration, the engine core's changes to it, and the executor are those of the releases: see
`tests.ascend.host`. All commands of a deployment get the same SOURCE.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.ascend.deployments import (
    Deployment,
    Running,
    balanced_inside,
    balanced_outside,
    free_ports,
    over_hosts,
)
from tests.ascend.kinds import KINDS, Store
from tests.ascend.processes import EngineFailed
from tests.ascend.pulls import Instance, differences, settings

ONE = {"tp_size": 1, "tp_rank": 0, "pp_size": 1, "pp_rank": 0, "ep_size": 1, "ep_rank": 0}
EP = {"enable_expert_parallel": True}

DEPLOYMENTS = {
    "tensor-parallel-two-hosts": Deployment(
        "w8a8", over_hosts(2, tensor_parallel_size=2), 2, [{"tp_size": 2, "tp_rank": rank} for rank in (0, 1)]
    ),
    "pipeline-parallel-two-hosts": Deployment(
        "llama", over_hosts(2, pipeline_parallel_size=2), 2, [{"pp_size": 2, "pp_rank": rank} for rank in (0, 1)]
    ),
    "experts-external-load-balancer": Deployment(
        "moe-w8a8", balanced_outside(2, **EP), 2, [{"ep_size": 2, "ep_rank": rank} for rank in (0, 1)]
    ),
    "tensor-parallel-in-two-replicas-four-hosts": Deployment(
        "qwen3-moe",
        over_hosts(4, tensor_parallel_size=2, data_parallel_size=2, data_parallel_external_lb=True, **EP),
        4,
        [{"tp_size": 2, "tp_rank": rank % 2, "ep_size": 4, "ep_rank": rank} for rank in range(4)],
    ),
    "replicas-of-a-dense-model": Deployment("llama", balanced_inside(2), 2, [{}, {}], one_command=True),
}


KEPT: Mapping[str, Any] = {"INT8_CACHE": "no", "KEEP_RAW": False, "TRANSPORT": "hccl"}


@contextmanager
def seed_and_client(deployment: Deployment) -> Iterator[tuple[Running, Running]]:
    with Running.on(range(4), deployment) as seed, Running.on(range(4, 8), deployment) as client:
        yield seed, client


def pulling(sources: Sequence[str]) -> dict[str, Any]:
    """The settings of all commands of a client: with a source for each rank."""
    return settings(sources, SERVE=False, FALLBACK=False, **KEPT)


@pytest.mark.parametrize("deployment", DEPLOYMENTS.values(), ids=DEPLOYMENTS.keys())
def test_each_rank_pulls_what_the_same_rank_of_the_source_serves(store: Store, deployment: Deployment) -> None:
    model, ranks = KINDS[deployment.kind].model, range(len(deployment.places))
    base = free_ports(len(ranks), in_a_row=True)[0]
    with seed_and_client(deployment) as (seed, client):
        theirs = seed.load(store.get(model), settings(LISTEN_PORT=base, **KEPT))
        assert [rank.number for rank in theirs] == list(ranks)
        for rank, place in zip(theirs, deployment.places, strict=True):
            assert ONE | dict(place) == {name: rank.topology[name] for name in ONE}
            assert rank.port == base + rank.number
            assert seed.count(f"rank {rank.number} serves target at {rank.address} ") == 1
        seed.profiled()
        ours = client.load(store.bare(model), pulling([rank.address for rank in theirs]))
        for rank in theirs:
            assert client.count(f"rank {rank.number}: target: pulled", f" from {rank.address} over hccl") == 1
    with Running.on(range(4), deployment) as without:
        disk = [rank.digests for rank in without.load(store.get(model))]
    assert not differences([rank.digests for rank in theirs], disk)
    assert not differences([rank.digests for rank in ours], disk)
    assert len({str(rank.digests) for rank in ours}) == (1 if deployment.one_command else len(ranks))


def test_a_rank_with_the_address_of_another_rank_is_refused_by_name(store: Store) -> None:
    """Control: both ranks of the data-parallel engines hold tensors of the same names and shapes."""
    deployment = DEPLOYMENTS["experts-external-load-balancer"]
    model = KINDS[deployment.kind].model
    with seed_and_client(deployment) as (seed, client):
        first, second = seed.load(store.get(model), settings(**KEPT))
        seed.profiled()
        with pytest.raises(EngineFailed):
            client.load(store.bare(model), pulling([second.address, first.address]))
        assert client.count("the identities differ", "ep_rank is '1' at the server and '0' at the client")
        assert client.count("the identities differ", "ep_rank is '0' at the server and '1' at the client")
        assert not client.count("target: pulled")


def test_another_number_of_stages_is_refused_by_name(store: Store, tmp_path: Path) -> None:
    deployment = DEPLOYMENTS["pipeline-parallel-two-hosts"]
    with Running.on(range(2), deployment) as seed, Instance.on([4], tmp_path / "client") as client:
        first, _ = seed.load(store.get("llama-bf16"), settings(**KEPT))
        seed.profiled()
        with pytest.raises(EngineFailed, match="the identities differ: pp_size is '2' at the server and '1' at the"):
            client.load(store.bare("llama-bf16"), {}, pulling([first.address]))
        assert client.lines("target: pulled") == [[]]


def test_vllm_starts_no_replicas_of_a_dense_model_for_a_load_balancer_outside(store: Store) -> None:
    """So each of them is an engine of its own: its only rank is 0."""
    deployment = Deployment("llama", balanced_outside(1, data_parallel_size=2), 1, [{}])
    with (
        Running.on([0], deployment) as running,
        pytest.raises(EngineFailed, match="Non-MoE models do not support external data parallel mode"),
    ):
        running.load(store.get("llama-bf16"))
