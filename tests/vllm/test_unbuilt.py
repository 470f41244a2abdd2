"""Parts of a model that vLLM leaves out: the output head of a pooling model, the encoder of an unused modality.

vLLM puts a placeholder in the place of the part, and builds the part without memory behind it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from netloader.vllm.model.snapshot import named_raw_tensors
from netloader.vllm.model.unbuilt import is_unbuilt
from tests.models import ModelStore
from tests.vllm import harness
from tests.vllm.pulls import offered, pull, source_of

pytestmark = pytest.mark.usefixtures("needs_vllm")

EMBEDS: dict[str, Any] = {"runner": "pooling", "convert": "embed"}
OVERRIDES = {
    "architectures": ["LlamaForSequenceClassification"],
    "method": "from_2_way_softmax",
    "classifier_from_token": ["no", "yes"],
}


def tokenizer(folder: Path) -> Path:
    """Ids of the two words that become a classifier."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder.mkdir()
    Tokenizer(WordLevel({"[UNK]": 0, "no": 1, "yes": 2}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    return folder


@pytest.fixture(params=["embeds", "classifies"])
def arguments(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    if request.param == "embeds":
        return EMBEDS
    return {"hf_overrides": OVERRIDES, "runner": "pooling", "tokenizer": str(tokenizer(tmp_path / "tokenizer"))}


@pytest.fixture
def with_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models get an encoder that is left out, by vLLM's own functions: multimodal models do not run here."""
    from vllm.model_executor.model_loader import base_loader
    from vllm.model_executor.models.utils import StageMissingLayer, no_init_weights

    build = base_loader.initialize_model

    def initialize(*arguments: Any, **more: Any) -> Any:
        model = build(*arguments, **more)
        with no_init_weights(model, lambda part: StageMissingLayer("image_tower", part)):
            model.vision_tower = torch.nn.Linear(8, 8)
        assert model.vision_tower.weight.is_meta
        return model

    monkeypatch.setattr(base_loader, "initialize_model", initialize)


def test_a_model_without_its_encoder_is_served_and_pulled(with_tower: None, models: ModelStore) -> None:
    disk = harness.load(harness.engine_config(models.get("llama-bf16")))
    seed, holding = offered(models.get("llama-bf16"), {})
    with source_of(holding) as source:
        pulled = pull(models.bare("llama-bf16"), source, FALLBACK=False)
    assert pulled.raw == seed.raw == disk.raw


def test_only_parts_without_memory_are_left_out() -> None:
    from vllm.model_executor.models.utils import StageMissingLayer

    part = torch.nn.Linear(2, 2)
    model = torch.nn.Module()
    model.tower = tower = StageMissingLayer("image_tower", part)
    assert not is_unbuilt(tower)
    assert not is_unbuilt(part)
    assert list(named_raw_tensors(model)) == ["tower.module.weight", "tower.module.bias"]
    part.to("meta")
    assert is_unbuilt(tower)
    assert not is_unbuilt(part)
    assert not named_raw_tensors(model)
    tower.register_buffer("scale", torch.ones(1))
    assert not is_unbuilt(tower), "the placeholder has memory of its own"
    assert "tower.scale" in named_raw_tensors(model)
    tower.scale = torch.ones(1, device="meta")
    assert is_unbuilt(tower)


@pytest.mark.parametrize("kind", ["llama-bf16", "llama-tied"])
def test_a_pooling_model_without_its_output_head_is_served_and_pulled(
    kind: str, arguments: dict[str, Any], models: ModelStore
) -> None:
    disk = harness.load(harness.engine_config(models.get(kind), **arguments))
    seed, holding = offered(models.get(kind), {}, arguments)
    assert seed.raw == disk.raw
    with source_of(holding) as source:
        pulled = pull(models.bare(kind), source, arguments=arguments, FALLBACK=False)
    assert pulled.raw == disk.raw
    assert harness.raw_digests(pulled.model) == harness.raw_digests(disk.model)
    assert not [name for name in pulled.raw if "lm_head" in name]
