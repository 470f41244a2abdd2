"""Models that differ only in their quantisation are not pulled from each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from netloader.core.model_key import key_of
from netloader.vllm.load import inspect_engine
from netloader.vllm.load.inspect_engine import model_identity
from netloader.vllm.model.quantisation import quantisation_of
from tests.models import ModelStore, strip_weights
from tests.vllm import harness, slim_method
from tests.vllm.pulls import LogLines, load, offered, pull, source_of

pytestmark = pytest.mark.usefixtures("needs_vllm")


@pytest.fixture
def folders(models: ModelStore, tmp_path: Path) -> dict[str, Path]:
    """The same weights under two descriptions."""
    return {
        kind: slim_method.described(models.get("draft"), tmp_path / kind, kind) for kind in ("W8A8_DYNAMIC", "W8A16")
    }


def text_of(folder: Path, **arguments: Any) -> str:
    settings: dict[str, Any] = {**slim_method.ARGUMENTS, **arguments}
    config = harness.engine_config(folder, **settings)
    return quantisation_of(config.model_config, config.cache_config, config.load_config).text


def test_a_file_that_only_the_method_knows_counts(folders: dict[str, Path]) -> None:
    one, other = (text_of(folder) for folder in folders.values())
    assert "" not in {one, other}
    assert one != other
    config = harness.engine_config(folders["W8A16"], quantization=slim_method.NAME)
    harness.load(config)
    assert quantisation_of(config.model_config, config.cache_config, config.load_config).text == other, "built or not"


def test_such_a_file_counts_beside_a_short_configuration(folders: dict[str, Path]) -> None:
    """The folder's files are compared also if config.json has a quantisation config."""
    stub = {"quantization_config": {"quant_method": slim_method.NAME}}
    one, other = (text_of(folder, hf_overrides=stub) for folder in folders.values())
    assert "" not in {one, other}
    assert one != other


def test_a_description_is_stated_in_words(folders: dict[str, Path]) -> None:
    """Settings for all tensors one by one, the methods of the tensors as their number and a digest."""
    folder = folders["W8A16"]

    def settings(**more: Any) -> dict[str, str]:
        told: dict[str, Any] = {
            "model.layers.0.a.weight": "W8A16",
            "model.layers.1.a.weight": "W8A16",
            "lm_head.weight": "FLOAT",
        }
        told |= {"version": "1.0.0", "group_size": 64, **more}
        (folder / slim_method.DESCRIPTION).write_text(json.dumps(told))
        config = harness.engine_config(folder, quantization=slim_method.NAME)
        return dict(quantisation_of(config.model_config, config.cache_config, config.load_config).settings)

    one = settings()
    assert one.pop("quantization.tensors").startswith("blake2b:")
    assert one.pop("quantization.methods") == "FLOAT 1, W8A16 2"
    assert one == {"quantization.version": "1.0.0", "quantization.group_size": "64"}
    moved = settings(**{"model.layers.1.a.weight": "FLOAT", "lm_head.weight": "W8A16"})
    assert moved["quantization.methods"] == "FLOAT 1, W8A16 2"
    assert moved["quantization.tensors"] != settings()["quantization.tensors"]
    many = settings(**{f"key_{number:02}": number for number in range(60)}, **{"k" * 65: 1})
    assert len(many) == 35, "bounded"
    assert many["quantization.others"].startswith("blake2b:")
    assert settings(metadata={"what": "x" * 65})["quantization.metadata"].startswith("blake2b:")


def test_where_the_files_are_need_not_be_the_name_of_the_model(folders: dict[str, Path]) -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    method = "auto_awq" if "auto_awq" in QUANTIZATION_METHODS else "awq"  # its name in older releases
    known = SimpleNamespace(quantization=method, hf_overrides={}, hf_config=SimpleNamespace())
    (folders["W8A16"] / "my-quantize_config.json").write_text('{"bits": 4}')
    named = SimpleNamespace(**vars(known), quantization_config=None, model="some/model")
    placed = SimpleNamespace(**vars(known), quantization_config=None, model=str(folders["W8A16"]))
    text = quantisation_of(placed, None).text
    assert len(text) == 32, "a file whose name ends as the method says"
    assert quantisation_of(named, None, folder=folders["W8A16"]).text == text


def test_a_method_without_any_configuration_is_named_as_one_of_arguments_only(models: ModelStore) -> None:
    plain = models.get("draft")
    online = text_of(plain, quantization="fp8")
    assert online.startswith("arguments only, ")
    assert online == text_of(plain, quantization="fp8")
    assert text_of(plain, quantization="fp8_per_tensor") not in {"", online}
    assert text_of(plain, quantization="fp8", kv_cache_dtype="fp8").startswith(f"{online}, kv-cache fp8")


def test_a_configuration_in_the_environment_counts(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = folders["W8A16"], tmp_path / "online.json"
    seen = {text_of(folder)}
    for value in ('{"bits": 4}', '{"bits": 8}'):
        monkeypatch.setenv("VLLM_HUMMING_ONLINE_QUANT_CONFIG", value)
        text = text_of(folder)
        file.write_text(value)
        monkeypatch.setenv("VLLM_HUMMING_ONLINE_QUANT_CONFIG", str(file))
        assert text_of(folder) == text
        seen.add(text)
    assert len(seen) == 3


# --- loads ----------------------------------------------------------------------------------------------------------

KEPT = {"INT8_CACHE": "dram"}


def test_a_seed_that_was_quantised_in_another_way_is_refused_by_name(
    folders: dict[str, Path], tmp_path: Path, log_lines: LogLines
) -> None:
    seed, holding = offered(folders["W8A8_DYNAMIC"], KEPT, slim_method.ARGUMENTS)

    def pull(folder: Path) -> harness.Loaded:
        log_lines.lines.clear()
        return load(folder, source, arguments=slim_method.ARGUMENTS, SERVE=False)

    with source_of(holding) as source:
        bare = strip_weights(folders["W8A8_DYNAMIC"], tmp_path / "bare")
        assert pull(bare).raw == seed.raw
        pull(folders["W8A16"])
    line = log_lines.one("the default loader (auto) loads", "could not pull")
    assert "the identities differ: quantization.methods is 'W8A8_DYNAMIC 1' at the server and 'W8A16 1' at the " in line
    assert "quantization_config" not in line, "a digest says no more"
    assert "files that say how the weights are quantised" in line
    assert not log_lines.with_part("TRANSFER"), "before the first byte"


def test_an_unknown_quantisation_is_neither_pulled_nor_served(
    folders: dict[str, Path], log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folders["W8A16"]
    seed, holding = offered(folder, KEPT, slim_method.ARGUMENTS)
    monkeypatch.setattr(slim_method.Config, "opaque", object())
    log_lines.lines.clear()
    with source_of(holding, quantization_config="") as source:
        assert load(folder, source, arguments=slim_method.ARGUMENTS).raw == seed.raw
    reason = f"nothing says how {slim_method.NAME} quantises this model"
    assert reason in log_lines.one("the default loader (auto) loads the target")
    assert reason in log_lines.one("does not serve its target")
    assert "its object has no content that can be compared" in log_lines.with_part("is not known:")[0]
    assert not log_lines.with_part("TRANSFER")


def test_a_source_that_does_not_announce_its_quantisation_is_refused(
    folders: dict[str, Path], log_lines: LogLines
) -> None:
    """An earlier release does so for such methods."""
    seed, holding = offered(folders["W8A16"], KEPT, slim_method.ARGUMENTS)
    log_lines.lines.clear()
    with source_of(holding, quantization_config="") as source:
        assert load(folders["W8A16"], source, arguments=slim_method.ARGUMENTS, SERVE=False).raw == seed.raw
    assert "quantization_config is '' at the server and " in log_lines.one("the default loader (auto) loads")


@pytest.mark.parametrize("kind", ["llama-w8a8", "llama-bf16"])
def test_what_is_published_has_the_key_that_a_client_looks_for_before_it_builds(
    kind: str, models: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: LogLines
) -> None:
    """With a scheme for the KV cache in the checkpoint, vLLM changes its own configuration while it builds layers."""
    folder = tmp_path / kind
    shutil.copytree(models.get(kind), folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    if "quantization_config" in config:
        scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
        config["quantization_config"]["kv_cache_scheme"] = scheme
    file.write_text(json.dumps(config))
    before: list[str] = []

    def inspect(*arguments: Any) -> Any:
        context = real(*arguments)
        engine = context.engine
        before.append(key_of(model_identity(engine, context.config, context.topology, context.settings)))
        return context

    real = inspect_engine.inspect
    monkeypatch.setattr(inspect_engine, "inspect", inspect)
    _, holding = offered(folder, {"INT8_CACHE": "dram"})
    assert before == [key_of(holding.announcement.identity)]
    with source_of(holding) as source:
        pull(folder, source, FALLBACK=False)
    assert log_lines.with_part("target: pulled")
