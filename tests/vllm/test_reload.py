"""A live model gets new weights from a source, through vLLM's own `reload_weights`: all of them, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from netloader.transports.faults import Fault, FaultKind
from netloader.vllm.live.reloading import ReloadRefused
from netloader.vllm.serve import serving
from tests.models import ModelStore, change_weight
from tests.vllm import harness
from tests.vllm.processors import on_each_processor
from tests.vllm.pulls import LogLines, Seeds, extra, load, offered, pull, source_of
from tests.vllm.releases import reload_in_place
from tests.vllm.reloads import config_of, damage, outputs, reload, same

pytestmark = pytest.mark.usefixtures("needs_vllm")


@pytest.fixture
def live(seeds: Seeds, models: ModelStore) -> Callable[[str], torch.nn.Module]:
    """A model that was pulled and serves, as an engine's would."""

    def make(kind: str) -> torch.nn.Module:
        with source_of(seeds.get(kind).holding) as source:
            return load(models.bare(kind), source).model

    return make


@on_each_processor
def test_a_live_model_reloads_from_a_source_and_serves_again(
    processor: str, seeds: Seeds, models: ModelStore, live: Callable[[str], torch.nn.Module], log_lines: LogLines
) -> None:
    model = live("llama-bf16")
    before, raw = outputs(model), harness.raw_digests(model)
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    damage(model)
    with source_of(seeds.get("llama-bf16").holding) as source:
        reload(model, config_of(models, "llama-bf16", source))
    assert same(outputs(model), before)
    assert harness.raw_digests(model) == raw
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers
    assert "MB of staging memory" in log_lines.one("reload: ")
    assert seeds.get("llama-bf16").holding.announcement.root in log_lines.one("reloaded, root")
    server = serving.running_server()
    assert server is not None
    assert pull(models.bare("llama-bf16"), server.address).raw == seeds.disk("llama-bf16")


def test_other_weights_are_refused_unless_they_are_named(
    seeds: Seeds, models: ModelStore, live: Callable[[str], torch.nn.Module], log_lines: LogLines
) -> None:
    other = seeds.changed("llama-bf16", "model.layers.1.mlp.down_proj.weight")
    model = live("llama-bf16")
    before = outputs(model)
    with source_of(other.holding) as source:
        with pytest.raises(ReloadRefused, match="stay as they are") as caught:
            reload(model, config_of(models, "llama-bf16", source))
        assert "EXPECT_ROOT" in caught.value.hint
        assert log_lines.one("the weights stay as they are")
        assert same(outputs(model), before)
        server = serving.running_server()
        assert server is not None
        assert pull(models.bare("llama-bf16"), server.address).raw == seeds.disk("llama-bf16"), "it serves on"
        root = other.holding.announcement.root
        reload(model, config_of(models, "llama-bf16", source, EXPECT_ROOT=root))
    assert not same(outputs(model), before)
    assert same(outputs(model), outputs(other.loaded.model))
    assert pull(models.bare("llama-bf16"), server.address).raw == other.loaded.raw


def test_a_source_that_dies_half_way_changes_nothing(
    seeds: Seeds, models: ModelStore, live: Callable[[str], torch.nn.Module]
) -> None:
    model = live("llama-bf16")
    before = outputs(model)
    cut = Fault(FaultKind.CUT, 1, byte=100, times=None)  # a session that delivered blocks is retried
    with source_of(seeds.get("llama-bf16").holding, cut) as source, pytest.raises(ReloadRefused):
        reload(model, config_of(models, "llama-bf16", source))
    assert same(outputs(model), before)
    assert "load_weights" not in vars(model)
    assert serving.running_server() is not None


@pytest.mark.parametrize(
    ("kind", "settings", "method"),
    [("llama-w8a8", {"INT8_CACHE": "dram"}, "CompressedTensors"), ("qwen3-moe", {}, "MoE")],
)
def test_what_vllms_reload_does_not_put_back_is_refused_by_name(
    kind: str, settings: dict[str, Any], method: str, seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    seed = seeds.get(kind, **settings)
    with source_of(seed.holding) as source:
        model = load(models.bare(kind), source, **settings).model
        before = harness.raw_digests(model)
        with pytest.raises(ReloadRefused, match=f"{method}|tied weights"):
            reload(model, config_of(models, kind, source, **settings))
    assert harness.raw_digests(model) == before
    assert log_lines.one("the weights stay as they are")


def test_without_a_source_the_default_loader_reloads_and_nothing_is_served(
    seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    model = load(models.get("llama-bf16")).model
    before = outputs(model)
    damage(model)
    config = harness.engine_config(models.get("llama-bf16"), load_format="netloader", extra=extra())
    reload(model, config)
    assert same(outputs(model), before)
    assert log_lines.one("serves its target no more")
    server = serving.running_server()
    assert server is not None
    with pytest.raises(Exception, match=r"reloaded from storage"):
        pull(models.bare("llama-bf16"), server.address, FALLBACK=False)


def test_a_path_beside_a_source_is_refused(
    seeds: Seeds, models: ModelStore, live: Callable[[str], torch.nn.Module]
) -> None:
    model = live("llama-bf16")
    before = outputs(model)
    with source_of(seeds.get("llama-bf16").holding) as source:
        config = config_of(models, "llama-bf16", source)
        with pytest.raises(ReloadRefused, match="a path was given"):
            reload_in_place(config, model, str(models.get("llama-bf16-other")))
    assert same(outputs(model), before)


def test_load_weights_refuses_a_model_that_is_live(
    seeds: Seeds, models: ModelStore, live: Callable[[str], torch.nn.Module], log_lines: LogLines
) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader

    model = live("llama-bf16")
    before = harness.raw_digests(model)
    config = config_of(models, "llama-bf16")
    with set_current_vllm_config(config), pytest.raises(ReloadRefused, match="is loaded") as caught:
        get_model_loader(config.load_config).load_weights(model, config.model_config)
    assert "reload_weights" in caught.value.hint
    assert log_lines.one("the weights stay as they are: load_weights was called for a model that is loaded")
    assert harness.raw_digests(model) == before


def test_the_digests_tell_a_reload_that_changed_one_weight(seeds: Seeds, models: ModelStore) -> None:
    """A check of the tests above: what they compare can differ."""
    changed = change_weight(
        models.get("llama-bf16"), seeds.folder / "control", "model.layers.0.self_attn.q_proj.weight"
    )
    other, _ = offered(changed, {})
    assert not same(outputs(other.model), outputs(seeds.get("llama-bf16").loaded.model))
