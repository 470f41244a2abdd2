"""vllm-ascend's worker sleeps, wakes up, and takes new weights: what it serves meanwhile and afterwards.

Its allocator is the real one. What it calls in C is simulated: pages of memory that are taken away, so that reading
them ends the process, and new pages with undefined contents. See `tests.ascend.sleeping`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from netloader import sync
from netloader.errors import RefusedError
from tests.ascend.kinds import KINDS, Store
from tests.ascend.processes import EngineFailed
from tests.ascend.pulls import Digests, Instance, differences, settings

PLAIN: Mapping[str, Any] = {"additional_config": {"weight_nz_mode": 0}}
"""Without the private memory formats, as their worker requires it of an engine that wakes up."""

ASLEEP = "the weights are about to change (sleep)"
NO_COPIES: Mapping[str, Any] = {"INT8_CACHE": "no", "KEEP_RAW": False}


@contextmanager
def seed_that_can_sleep(
    store: Store, folder: Path, model: str, more: Mapping[str, Any] = PLAIN, **server: Any
) -> Iterator[tuple[Instance, str, list[Digests]]]:
    """A seed, the address of its server, and what it holds."""
    with Instance.on([0], folder / "seed", VLLM_ASCEND_ENABLE_NZ="0" if more is PLAIN else "1") as seed:
        arguments = {"enable_sleep_mode": True, **more}
        loaded = seed.load(store.get(model), arguments, settings(TRANSPORT="hccl", **server))
        seed.profiled()
        (address,) = seed.addresses()
        yield seed, address, list(loaded)


def refusal(address: str) -> str:
    """Why the server does not serve."""
    with pytest.raises(RefusedError) as refused:
        sync.probe(address)
    return refused.value.message


@pytest.mark.parametrize(
    ("kind", "server"),
    [("llama", {}), ("w8a8", NO_COPIES), ("w4a8", {"INT8_CACHE": "hbm", "KEEP_RAW": False})],
    ids=["by reference", "computed", "copies on the card"],
)
def test_what_slept_is_served_again_if_its_bytes_came_back(
    store: Store, tmp_path: Path, kind: str, server: Mapping[str, Any]
) -> None:
    model = KINDS[kind].model
    with seed_that_can_sleep(store, tmp_path, model, **server) as (seed, address, loaded):
        (slept,) = seed.all("sleep", level=1)
        assert slept["freed"] > 2**20
        assert refusal(address) == ASLEEP
        seed.all("wake_up", tags=["kv_cache"])
        assert refusal(address) == ASLEEP, "the weights sleep on"
        seed.all("wake_up", tags=["weights"])
        assert len(seed.lines("serves its target again: they woke up")[0]) == 1, seed.engines[0].text()
        with Instance.on([1], tmp_path / "client") as client:
            own = settings([address], TRANSPORT="hccl", SERVE=False, FALLBACK=False)
            pulled = client.load(store.bare(model), PLAIN, own)
        assert not differences(pulled, loaded)
        assert seed.all("final") == [loaded[0]["final"]]

        seed.all("sleep", level=2)
        assert refusal(address) == ASLEEP
        seed.all("wake_up", tags=None)
        assert "is not what it was when it was announced" in refusal(address)
        assert len(seed.lines("what was served before sleep is not served any more")[0]) == 1


def test_experts_that_their_wake_up_transposes_are_not_served_any_more(store: Store, tmp_path: Path) -> None:
    """It expects new weights for experts without quantisation: the layer could not compute with the old ones."""
    with seed_that_can_sleep(store, tmp_path, "qwen3-moe", **NO_COPIES) as (seed, address, loaded):
        seed.all("sleep", level=1)
        seed.all("wake_up", tags=None)
        (now,) = seed.all("final")
        before = loaded[0]["final"]["target"]
        changed = {name.rpartition(".")[2] for name, digest in now["target"].items() if digest != before.get(name)}
        assert changed == {"w13_weight", "w2_weight"}
        assert "experts.w13_weight was dropped by its owner" in refusal(address)
        assert not any(seed.lines("serves its target again"))


def test_an_engine_that_cannot_wake_up_serves_nothing(store: Store, tmp_path: Path) -> None:
    """With the private formats, which are the default."""
    with seed_that_can_sleep(store, tmp_path, "w8a8", {}, **NO_COPIES) as (seed, address, _):
        seed.all("sleep", level=1)
        with pytest.raises(EngineFailed, match="FRACTAL_NZ mode is enabled"):
            seed.all("wake_up", tags=None)
        assert refusal(address) == ASLEEP


def test_weights_from_a_trainer_are_not_served(store: Store, tmp_path: Path) -> None:
    with seed_that_can_sleep(store, tmp_path, "llama-bf16") as (seed, address, loaded):
        name = "model.layers.0.input_layernorm.weight"
        seed.all("update", name=name)
        (now,) = seed.all("final")
        assert [each for each, digest in now["target"].items() if digest != loaded[0]["final"]["target"][each]] == [
            name
        ]
        assert refusal(address) == "the weights are about to change (start_weight_update)"
