"""Expert maps: the placement of experts is compared before the first byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from netloader.vllm.model.expert_maps import expert_maps
from netloader.vllm.model.snapshot import UnnamedTensors, named_raw_tensors
from tests.models import ModelStore
from tests.vllm import harness
from tests.vllm.pulls import LogLines, Seeds, load, offered, source_of

MAPS: dict[str, Any] = {"moe_layer_count": 1, "layer_list": [{"device_list": [{"device_expert": [0, 1]}]}]}


def test_maps_are_found_by_name_wherever_a_layer_has_them() -> None:
    def text(change: Callable[[Any], object]) -> str:
        model: Any = torch.nn.Sequential(torch.nn.Linear(2, 2))
        # Integer tensors that are not maps: uninitialised memory, and a table from the checkpoint.
        model[0].qweight = torch.nn.Parameter(torch.randint(99, (64,), dtype=torch.int32), requires_grad=False)
        model[0].indices = torch.randint(99, (64,), dtype=torch.int32)
        model[0].register_buffer("token_ordering", torch.randint(99, (64,)))
        change(model[0])
        return expert_maps(model)

    values = torch.tensor([0, 1, -1, -1], dtype=torch.int32)
    assert text(lambda layer: None) == ""
    assert text(lambda layer: layer.register_buffer("_expert_map", None)) == ""
    attribute = text(lambda layer: setattr(layer, "log2phy", values))
    assert attribute.startswith("maps ")
    assert attribute == text(lambda layer: setattr(layer, "log2phy", values.clone()))
    assert attribute == text(lambda layer: layer.register_buffer("log2phy", values, persistent=False))
    others = {
        attribute,
        text(lambda layer: setattr(layer, "log2phy", values.flip(0))),
        text(lambda layer: setattr(layer, "global_expert_map", values)),
        text(lambda layer: layer.register_buffer("_expert_map", values)),
        text(lambda layer: layer.register_buffer("_expert_map", values.long())),
    }
    assert len(others) == 5


# --- loads ----------------------------------------------------------------------------------------------------------

Placed = Callable[[list[int]], None]


@pytest.fixture
def placed(needs_vllm: None, monkeypatch: pytest.MonkeyPatch) -> Placed:
    """Adds expert maps to each model that vLLM builds, like vllm-ascend: one as a buffer, one as an attribute."""
    from vllm.model_executor.model_loader import base_loader

    build, now = base_loader.initialize_model, [0, 1]

    def initialize(*arguments: Any, **more: Any) -> Any:
        model = build(*arguments, **more)
        experts = model.model.layers[0].mlp
        experts.register_buffer("_expert_map", torch.tensor(now, dtype=torch.int32))
        experts.log2phy = torch.tensor(now[::-1], dtype=torch.int32)
        return model

    monkeypatch.setattr(base_loader, "initialize_model", initialize)

    def place(values: list[int]) -> None:
        now[:] = values

    return place


def held(loaded: harness.Loaded) -> list[int]:
    model: Any = loaded.model
    experts = model.model.layers[0].mlp
    assert experts.log2phy.tolist() == experts._expert_map.tolist()[::-1]
    found: list[int] = experts._expert_map.tolist()
    return found


def test_a_source_that_places_experts_otherwise_is_refused_by_name(
    placed: Placed, models: ModelStore, log_lines: LogLines
) -> None:
    folder, bare = models.get("qwen3-moe"), models.bare("qwen3-moe")
    seed, holding = offered(folder, {})
    with source_of(holding) as source:
        assert load(bare, source, SERVE=False).raw == seed.raw
        log_lines.lines.clear()
        placed([1, 0])
        assert held(load(folder, source, SERVE=False)) == [1, 0]
    line = log_lines.one("the default loader (auto) loads", "could not pull")
    assert "the identities differ: expert_placement is 'maps " in line
    assert not log_lines.with_part("TRANSFER"), "before the first byte"


def test_a_map_is_no_weight_however_a_layer_holds_it() -> None:
    """It is not pulled. If loading changed it, a client would not get that, so that such a model is not served."""

    def fill(layer: Any, values: list[int]) -> None:
        layer.register_buffer("_expert_map", torch.tensor(values, dtype=torch.int32))
        layer.log2phy = torch.nn.Parameter(torch.tensor(values, dtype=torch.int32), requires_grad=False)
        layer.global_expert_map = torch.tensor([values, values], dtype=torch.int32)

    model: Any = torch.nn.Sequential(torch.nn.Linear(2, 2))
    usual = list(named_raw_tensors(model))
    fill(model[0], [0, 1])
    assert list(named_raw_tensors(model)) == usual == ["0.weight", "0.bias"]
    before = UnnamedTensors(model)
    fill(model[0], [1, 0])
    assert before.changed_by_loading(model) == ["0._expert_map", "0.global_expert_map", "0.log2phy"]
    model[0].expert_mask = torch.nn.Parameter(torch.ones(2))
    assert list(named_raw_tensors(model)) == [*usual, "0.expert_mask"], "a weight that only has the name of a map"


def test_maps_are_not_pulled(placed: Placed, models: ModelStore) -> None:
    seed, holding = offered(models.get("qwen3-moe"), {})
    with source_of(holding) as source:
        loaded = load(models.bare("qwen3-moe"), source, SERVE=False)
    assert loaded.raw == seed.raw
    assert held(loaded) == held(seed) == [0, 1]
    names = {spec.name for spec in holding.announcement.manifest.tensors}
    assert not {name for name in names if name.endswith(("_expert_map", "log2phy"))}


def test_a_map_that_only_the_client_was_given_is_a_difference(
    seeds: Seeds, models: ModelStore, tmp_path: Path, log_lines: LogLines
) -> None:
    file = tmp_path / "map.json"
    file.write_text(json.dumps(MAPS))
    seed = seeds.get("qwen3-moe")
    log_lines.lines.clear()
    arguments = {"additional_config": {"eplb_config": {"expert_map_path": str(file)}}}
    with source_of(seed.holding) as source:
        assert load(models.get("qwen3-moe"), source, arguments=arguments, SERVE=False).raw == seed.disk
    line = log_lines.one("the default loader (auto) loads", "could not pull")
    assert "additional_config.eplb_config.expert_map_path is 'not set' at the server and 'blake2b:" in line
    assert str(file) not in line
    assert not log_lines.with_part("TRANSFER"), "before the first byte"
