"""Settings of vLLM that decide tensors: engines that differ in one are refused by its path, and no others are."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import linecache
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.config import KernelConfig
from vllm.config.utils import config as configuration

from netloader.core.identity import Role
from netloader.vllm.load import inspect_engine
from netloader.vllm.load.inspect_engine import Engine
from netloader.vllm.model.plain_values import hidden_text
from netloader.vllm.model.settings import ENVIRONMENT, Settings, read_table, settings_of
from netloader.vllm.model.snapshot import named_raw_tensors
from tests.models import ModelStore
from tests.vllm import harness
from tests.vllm.pulls import DRAFT, LogLines, Seeds, load, pull, source_of

pytestmark = pytest.mark.usefixtures("needs_vllm")

KIND = "llama-bf16"

Field: Any = pytest.importorskip("pydantic").Field


@pytest.fixture
def folder(models: ModelStore) -> Path:
    return models.get(KIND)


def stated(
    folder: Path, change: Callable[[Any], None] | None = None, role: Role = "target", **arguments: Any
) -> Settings:
    """The settings of an engine with these arguments and this change of its configuration."""
    config = harness.engine_config(folder, **arguments)
    if change is not None:
        change(config)
    model = config.model_config if role == "target" else config.speculative_config.draft_model_config
    found = settings_of(config, model, role, folder)
    assert found.unknown == ""
    return found


# --- the walk, with the classes that are installed ------------------------------------------------------------------


def _fields(config: Any) -> Iterator[tuple[Any, str]]:
    for field in dataclasses.fields(config):
        yield config, field.name
        value = getattr(config, field.name, None)
        if type(value).__module__.startswith("vllm.config") and type(value).__name__ in read_table():
            yield from _fields(value) if field.name not in ("target_model_config", "target_parallel_config") else ()


def test_every_field_of_a_real_configuration_is_classed(folder: Path) -> None:
    from vllm.envs import environment_variables

    table = read_table()
    found = {(type(owner).__name__, name) for owner, name in _fields(harness.engine_config(folder))}
    assert [pair for pair in sorted(found) if pair[1] not in table[pair[0]]] == []
    assert {("VllmConfig", "model_config"), ("KernelConfig", "moe_backend"), ("EPLBConfig", "policy")} <= found
    assert set(environment_variables) <= table[ENVIRONMENT].keys()


@configuration
class Invented:
    """A configuration that no table lists."""

    inner: int = 3


@configuration
class Newer(KernelConfig):
    """A configuration of a release that the table does not know."""

    invented: str = "one"
    counted: int = Field(default=4, ge=1)
    listed: list[int] = Field(default_factory=list)
    derived: int = dataclasses.field(default=5, init=False)
    nested: Invented = dataclasses.field(default_factory=Invented)


def hidden(values: dict[str, Any]) -> dict[str, str]:
    """The texts of settings that are not classed."""
    return {path: hidden_text(path, value) for path, value in values.items()}


def test_a_field_that_is_not_classed_counts_unless_it_is_at_its_default(folder: Path) -> None:
    usual = stated(folder)

    def paths(**values: Any) -> dict[str, str]:
        def change(config: Any) -> None:
            config.kernel_config = Newer()
            for name, value in values.items():
                setattr(config.kernel_config, name, value)

        found = stated(folder, change)
        assert found.processed == usual.processed
        return {path: text for path, text in found.weights.items() if path not in usual.weights}

    assert paths() == paths(derived=6) == {}
    assert paths(invented="two") == hidden({"kernel_config.invented": "two"})
    assert paths(listed=[1]) == hidden({"kernel_config.listed": [1]})
    assert paths(counted=5) == hidden({"kernel_config.counted": 5})
    four: Any = Invented()
    four.inner = 4
    assert paths(nested=four) == hidden({"kernel_config.nested.inner": 4})


def test_a_variable_that_is_not_classed_counts_if_it_is_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    monkeypatch.setitem(envs.environment_variables, "VLLM_INVENTED", lambda: 7)
    assert "VLLM_INVENTED" not in stated(folder).weights
    monkeypatch.setenv("VLLM_INVENTED", "7")
    assert stated(folder).weights["VLLM_INVENTED"] == hidden_text("VLLM_INVENTED", 7)


@pytest.mark.parametrize("name", ["VLLM_INVENTED_KEY", "VLLM_ASCEND_INVENTED_KEY"])
def test_the_value_of_a_setting_that_is_not_classed_goes_to_no_peer(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has said that it is no secret."""
    from vllm import envs

    if "ASCEND" not in name:
        monkeypatch.setitem(envs.environment_variables, name, lambda: os.environ[name])
    texts: list[str] = []
    for secret in ("hunter2", "hunter3"):
        monkeypatch.setenv(name, secret)
        found = stated(folder, additional_config={"invented": {"password": secret}})
        assert secret not in str(found)
        texts.append(found.weights[name])
        assert found.weights["additional_config.invented.password"] != found.weights[name], "not one digest for all"
    assert texts[0] != texts[1]
    assert all(text.startswith("a value that is not shown (digest ") for text in texts)


# --- what matches ---------------------------------------------------------------------------------------------------


def test_a_plain_engine_states_nothing_that_a_peer_of_protocol_1_would_have_to_state(folder: Path) -> None:
    assert stated(folder).weights.keys() == {"model_config.hf_config"}


def test_engines_of_a_fleet_match(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They differ in hosts, memory, names, requests and logs, and in what was written into config.json."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    told = json.loads((copy / "config.json").read_text())
    told |= {"_name_or_path": "/elsewhere", "transformers_version": "9.9.9", "use_cache": False, "eos_token_id": 5}
    (copy / "config.json").write_text(json.dumps(told))
    one = stated(folder)
    for name, value in {"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_HOST_IP": "10.0.0.8", "VLLM_PORT": "7777"}.items():
        monkeypatch.setenv(name, value)
    arguments: dict[str, Any] = {
        "gpu_memory_utilization": 0.5,
        "max_num_seqs": 7,
        "max_num_batched_tokens": 2048,
        "kv_cache_memory_bytes": 1 << 25,
        "seed": 9,
        "served_model_name": "another",
        "trust_remote_code": True,
        "limit_mm_per_prompt": {},
        "enable_prefix_caching": False,
        "download_dir": str(tmp_path),
        "tokenizer": str(folder),
    }
    assert stated(copy, **arguments) == one


def test_a_setting_that_is_given_at_its_usual_value_matches_one_that_is_not(folder: Path) -> None:
    usual: dict[str, Any] = {"convert": "none", "runner": "generate", "kv_cache_dtype": "auto", "hf_overrides": {}}
    assert stated(folder, **usual) == stated(folder)


# --- what is refused ------------------------------------------------------------------------------------------------


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        *owners, name = path.split(".")
        setattr(functools.reduce(getattr, owners, config), name, value)

    return change


def _multimodal(**values: Any) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        from vllm.config import MultiModalConfig

        config.model_config.multimodal_config = MultiModalConfig(**values)

    return change


WEIGHTS: dict[str, tuple[str, str, Callable[[Any], None] | None, dict[str, Any]]] = {
    "overrides": ("model_config.hf_overrides", '{"rope_theta": 1.0}', None, {"hf_overrides": {"rope_theta": 1.0}}),
    "convert": ("model_config.convert", "embed", None, {"convert": "embed", "runner": "pooling"}),
    "runner": ("model_config.runner", "pooling", None, {"convert": "embed", "runner": "pooling"}),
    "code": ("model_config.code_revision", "r2", None, {"code_revision": "r2"}),
    "decode context": (
        "parallel_config.decode_context_parallel_size",
        "2",
        _set("parallel_config.decode_context_parallel_size", 2),
        {},
    ),
    "prefill context": (
        "parallel_config.prefill_context_parallel_size",
        "4",
        _set("parallel_config.prefill_context_parallel_size", 4),
        {},
    ),
    "placement": (
        "parallel_config.expert_placement_strategy",
        "round_robin",
        None,
        {"expert_placement_strategy": "round_robin"},
    ),
    "redundant": (
        "parallel_config.eplb_config.num_redundant_experts",
        "2",
        _set("parallel_config.eplb_config.num_redundant_experts", 2),
        {},
    ),
    "encoder": (
        "model_config.multimodal_config.mm_encoder_tp_mode",
        "data",
        _multimodal(mm_encoder_tp_mode="data"),
        {},
    ),
    "no images": (
        "model_config.multimodal_config.limit_per_prompt",
        '["image"]',
        _multimodal(limit_per_prompt={"image": 0, "video": 3}),
        {},
    ),
    "text only": (
        "model_config.multimodal_config.language_model_only",
        "true",
        _multimodal(language_model_only=True),
        {},
    ),
}

PROCESSED: dict[str, tuple[str, str, Callable[[Any], None] | None, dict[str, Any]]] = {
    "experts' kernels": ("kernel_config.moe_backend", "triton", None, {"kernel_config": {"moe_backend": "triton"}}),
    "linear kernels": ("kernel_config.linear_backend", "marlin", _set("kernel_config.linear_backend", "marlin"), {}),
    "KV cache": ("cache_config.cache_dtype", "fp8", None, {"kv_cache_dtype": "fp8"}),
    "length": ("model_config.max_model_len", "256", None, {"max_model_len": 256}),
    "attention": (
        "attention_config.use_trtllm_attention",
        "true",
        _set("attention_config.use_trtllm_attention", True),
        {},
    ),
    "positions": (
        "model_config.hf_text_config.rope_parameters",
        '{"rope_theta": 7.0, "rope_type": "default"}',
        _set("model_config.hf_text_config.rope_parameters", {"rope_theta": 7.0, "rope_type": "default"}),
        {},
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_what_decides_weights_is_stated_by_its_path(case: str, folder: Path) -> None:
    path, text, change, arguments = WEIGHTS[case]
    usual, found = stated(folder), stated(folder, change, **arguments)
    assert path not in usual.weights
    assert found.weights[path] == text


@pytest.mark.parametrize("case", PROCESSED)
def test_what_decides_processed_weights_is_stated_apart(case: str, folder: Path) -> None:
    path, text, change, arguments = PROCESSED[case]
    usual, found = stated(folder), stated(folder, change, **arguments)
    assert usual.processed.get(path) != text
    assert found.processed[path] == text
    assert found.weights == usual.weights, "raw weights are pulled all the same"


def test_backends_of_linear_layers_count_by_quantisation_too(folder: Path) -> None:
    if "linear_backend_per_quant" not in _names(harness.engine_config(folder).kernel_config):
        pytest.skip("this vLLM has no such setting")
    found = stated(folder, _set("kernel_config.linear_backend_per_quant", {"fp8": "marlin"}))
    assert found.processed["kernel_config.linear_backend_per_quant"] == '{"fp8": "marlin"}'


def _names(config: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def test_scales_of_an_encoder_are_compared_by_their_contents(folder: Path, tmp_path: Path) -> None:
    def found(file: Path) -> Settings:
        config = harness.engine_config(folder)
        _multimodal()(config)
        config.model_config.multimodal_config.mm_encoder_fp8_scale_path = str(file)
        return settings_of(config, config.model_config, "target", folder)

    path = "model_config.multimodal_config.mm_encoder_fp8_scale_path"
    files = [tmp_path / name for name in ("one.json", "same.json", "other.json")]
    for file, scale in zip(files, (1.5, 1.5, 2.5), strict=True):
        file.write_text(json.dumps({"q": scale}))
    one, same, other = (found(file).processed[path] for file in files)
    assert one == same == '{"q": 1.5}'
    assert other == '{"q": 2.5}'
    assert f"{path} names {tmp_path / 'none'}, which can't be read" in found(tmp_path / "none").unknown


TRI_STATE = {"use_trtllm_attention": "attention_config", "index_share_for_mtp_iteration": "speculative_config"}


@pytest.mark.parametrize("name", TRI_STATE)
def test_what_was_forced_off_is_not_what_vllm_chooses(name: str, folder: Path, models: ModelStore) -> None:
    path, draft = f"{TRI_STATE[name]}.{name}", {**DRAFT, "model": str(models.get("draft"))}
    if name not in _names(getattr(harness.engine_config(folder, speculative_config=draft), TRI_STATE[name])):
        pytest.skip("this vLLM has no such setting")

    def found(value: bool | None) -> str | None:
        arguments: dict[str, Any] = {"role": "draft", "speculative_config": draft}
        return stated(folder, _set(path, value), **arguments).processed.get(path)

    assert [found(value) for value in (None, False, True)] == [None, "false", "true"]


@pytest.mark.parametrize("rate", [None, 0.0])
def test_a_rate_of_zero_prunes_nothing(rate: float | None, folder: Path) -> None:
    start = "model_config.multimodal_config.video_pruning"
    found = stated(folder, _multimodal(video_pruning_rate=rate))
    assert [path for path in found.processed if path.startswith(start)] == []
    assert stated(folder, _multimodal(video_pruning_rate=0.5)).processed[f"{start}_rate"] == "0.5"


def test_a_limit_that_keeps_the_encoder_does_not_count(folder: Path) -> None:
    path = "model_config.multimodal_config.limit_per_prompt"
    assert path not in stated(folder, _multimodal(limit_per_prompt={"image": 3})).weights


@pytest.mark.parametrize(("name", "raw"), [("VLLM_MLA_DISABLE", True), ("VLLM_DISABLED_KERNELS", False)])
def test_variables_that_decide_count(name: str, raw: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    found = stated(folder)
    assert (name in found.weights, name in found.processed) == (raw, not raw)


def test_a_long_value_is_stated_as_a_digest(folder: Path) -> None:
    texts = {
        stated(folder, hf_overrides={"name_of_a_key": value * 70}).weights["model_config.hf_overrides"]
        for value in ("a", "b")
    }
    assert len(texts) == 2
    assert {text.partition(":")[0] for text in texts} == {"blake2b"}
    assert {len(text) for text in texts} == {40}


def test_files_of_a_quantisation_are_compared_by_content_and_not_by_path(folder: Path) -> None:
    def change(config: Any) -> None:
        config.model_config.hf_overrides = {"quantization_config_file": "/a/path/of/one/host"}

    assert stated(folder, change) == stated(folder)


@pytest.mark.parametrize("key", ["num_attention_heads", "a_key_that_nobody_knows"])
def test_another_configuration_file_counts(key: str, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    told = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**told, key: 2}))
    texts = {stated(each).weights["model_config.hf_config"] for each in (folder, copy)}
    assert len(texts) == 2
    # A file at --hf-config-path takes its place.
    assert stated(folder, hf_config_path=str(copy)).weights["model_config.hf_config"] in texts
    assert stated(folder, hf_config_path=str(copy)) != stated(folder)


def _at(folder: Path, path: str) -> Settings:
    config = harness.engine_config(folder)
    config.model_config.hf_config_path = path
    return settings_of(config, config.model_config, "target", folder)


def test_a_configuration_file_in_a_repository_counts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--hf-config-path` names a folder or a repository, which is looked for in the cache of the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a1" * 20)
    snapshot = repository / "snapshots" / ("a1" * 20)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    path = "model_config.hf_config"
    assert _at(folder, "org/name").weights[path] == _at(folder, str(snapshot)).weights[path]
    assert _at(folder, "org/name").weights[path] != stated(folder).weights[path]


@pytest.mark.parametrize("text", [None, "no json"])
def test_a_configuration_file_that_was_given_and_can_not_be_read_is_not_comparable(
    text: str | None, folder: Path, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert str(tmp_path) in _at(folder, str(tmp_path)).unknown
    assert "org/none" in _at(folder, "org/none").unknown


# --- functions in hf_overrides --------------------------------------------------------------------------------------


def unchanged(config: Any) -> Any:
    return config


def also_unchanged(config: Any) -> Any:
    return config


def overridden(folder: Path, function: Any) -> Settings:
    config = harness.engine_config(folder)
    config.model_config.hf_overrides = function
    return settings_of(config, config.model_config, "target", folder)


def test_functions_are_compared_by_name_and_source(folder: Path) -> None:
    pair = (lambda config: 1, lambda config: 2)
    functions = [unchanged, also_unchanged, *pair, functools.partial(unchanged, 1), functools.partial(unchanged, 2)]
    texts = [overridden(folder, function).weights["model_config.hf_overrides"] for function in functions]
    assert len(set(texts)) == len(texts)
    assert texts[0].startswith("unchanged ")
    assert texts == [overridden(folder, function).weights["model_config.hf_overrides"] for function in functions]


MODULE = """
import json
import os
import helpers
from collections import OrderedDict
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch

HEADS = {value}
LAYERS = [1, 2, {value}]
NAMES = {{"a": {value}}}

def helper(config):
    return HEADS

def constant(config):
    config.num_attention_heads = HEADS
    return config

def nested(config):
    def inner():
        return [LAYERS[0] for _ in range(3)]
    config.layers = inner()
    return config

class Plain:
    value = {value}

def calls_a_helper(config):
    return helper(config)

def uses_a_class(config):
    return Plain.value

def uses_another_module(config):
    return helpers.heads

def imports_another_module(config):
    from helpers import heads
    return heads

def imports_a_neighbour(config):
    from .json import heads
    return heads

def uses_known_modules(config):
    import math
    config.dtype = torch.bfloat16, json.dumps(1), OrderedDict(), deepcopy(1), math.pi, len(sorted([1]))
    config.HEADS = 1
    return config

ORDERED = SimpleNamespace(heads=HEADS)

def reads_an_object(config):
    return ORDERED.heads

@torch.no_grad()
def wrapped(config):
    return HEADS

def calls_a_wrapped_helper(config):
    return wrapped(config)

def reads_the_host(config):
    return os.environ["HEADS"]

def reads_a_file(config):
    return open("/heads").read()

def missing(config):
    return not_defined_yet

by_lambda = lambda config: NAMES
"""


def _module(folder: Path, monkeypatch: pytest.MonkeyPatch, value: int) -> dict[str, Any]:
    """The functions of a module of a user with this constant in it."""
    package = folder / f"value_{value}"
    package.mkdir()
    (package / "helpers.py").write_text("heads = 3")
    (package / "of_user.py").write_text(MODULE.format(value=value))
    monkeypatch.syspath_prepend(package)
    for name in ("helpers", "of_user"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = vars(importlib.import_module("of_user"))
    linecache.checkcache()
    return found


@pytest.mark.parametrize("name", ["constant", "nested", "by_lambda", "uses_known_modules"])
def test_what_a_function_reads_from_its_module_is_compared(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source of both is equal, and their constants differ."""
    texts = []
    for value in (4, 5):
        found = overridden(folder, _module(tmp_path, monkeypatch, value)[name])
        assert found.unknown == ""
        texts.append(found.weights["model_config.hf_overrides"])
    assert (texts[0] == texts[1]) == (name == "uses_known_modules")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("calls_a_helper", "helper"),
        ("uses_a_class", "Plain"),
        ("uses_another_module", "helpers"),
        ("imports_another_module", "helpers"),
        ("imports_a_neighbour", ".json"),
        ("reads_an_object", "ORDERED"),
        ("calls_a_wrapped_helper", "wrapped"),
        ("reads_the_host", "os"),
        ("reads_a_file", "open"),
        ("missing", "not_defined_yet"),
    ],
)
def test_a_function_that_uses_code_that_is_not_compared_makes_the_settings_unknown(
    name: str, told: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = overridden(folder, _module(tmp_path, monkeypatch, 4)[name]).unknown
    assert f"the function {name} in hf_overrides uses {told}" in unknown


def test_a_function_that_can_not_be_compared_makes_the_settings_unknown(folder: Path) -> None:
    factor = 3

    def closure(config: Any) -> Any:
        return config, factor

    for function in (closure, eval("lambda config: config"), functools.partial(closure), print):
        found = overridden(folder, function)
        assert "hf_overrides" in found.unknown
        assert found.weights == {}


def test_what_vllm_itself_sets_for_a_draft_is_left_out(models: ModelStore) -> None:
    draft = {**DRAFT, "model": str(models.get("draft"))}
    found = stated(models.get(KIND), role="draft", speculative_config=draft)
    assert found.weights.keys() == {"model_config.hf_config"}
    target = stated(models.get(KIND), speculative_config={**draft, "moe_backend": "triton"})
    assert target == stated(models.get(KIND)), "a target does not depend on its draft"
    other = stated(models.get(KIND), role="draft", speculative_config={**draft, "moe_backend": "triton"})
    assert other.processed["speculative_config.moe_backend"] == "triton"


# --- loads ----------------------------------------------------------------------------------------------------------


def test_a_source_with_another_override_is_refused_before_a_byte_moves(
    seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    seed = seeds.get(KIND)
    overrides = {"hf_overrides": {"attention_bias": False, "of_the_client": 1}}
    with source_of(seed.holding) as source:
        assert load(models.get(KIND), source, SERVE=False, arguments=overrides).raw == seed.disk
        line = log_lines.one("default loader", "could not pull")
        assert "model_config.hf_overrides is 'not set' at the server and '{" in line
        assert "of_the_client" in line
        assert "start both sides with the same arguments" in line
        assert not log_lines.with_part("TRANSFER")


def test_engines_with_equal_settings_pull_from_each_other(
    seeds: Seeds, models: ModelStore, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    from netloader.vllm.serve import serving

    monkeypatch.setenv("VLLM_MLA_DISABLE", "0")
    overrides = {"hf_overrides": {"attention_bias": False}, "code_revision": "r1"}
    disk = load(models.get(KIND), arguments=overrides)
    server = serving.running_server()
    assert server is not None
    (holding,) = server._server.holdings.held()
    serving.stop_server()
    settings = holding.announcement.identity.settings
    assert settings is not None
    assert settings.keys() >= {"model_config.hf_overrides", "model_config.code_revision", "VLLM_MLA_DISABLE"}
    with source_of(holding) as source:
        log_lines.lines.clear()
        pulled = load(models.bare(KIND), source, SERVE=False, arguments=overrides)
    assert pulled.raw == disk.raw
    assert log_lines.one("pulled", "from 127.0.0.1")


def test_an_engine_serves_what_its_source_knows_of_the_configuration_file(
    seeds: Seeds, models: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows no file. A client with another file than its source's would pull from it else."""
    from netloader.vllm.serve import serving

    path = "model_config.hf_config"
    seed = seeds.get(KIND)
    told = seed.holding.announcement.identity.settings
    assert told is not None
    monkeypatch.setattr(inspect_engine, "settings_of", lambda *_: Settings())
    with source_of(seed.holding) as source:
        assert load(models.bare(KIND), source).raw == seed.disk
    server = serving.running_server()
    assert server is not None
    (holding,) = server._server.holdings.held()
    serving.stop_server()
    assert holding.announcement.identity.settings == {path: told[path]}


def test_a_peer_of_protocol_1_serves_engines_without_settings(
    seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    seed = seeds.get(KIND)
    log_lines.lines.clear()
    nothing: dict[str, Any] = {"settings": None, "processed_settings": None}
    with source_of(seed.holding, **nothing) as source:
        assert pull(models.bare(KIND), source).raw == seed.disk
        assert not log_lines.with_part("default loader")
        arguments = {"code_revision": "r2"}
        assert load(models.get(KIND), source, SERVE=False, arguments=arguments).raw == seed.disk
    line = log_lines.one("default loader", "could not pull")
    assert "model_config.code_revision is 'not stated' at the server and 'r2' at the client" in line


def test_settings_that_can_not_be_compared_forbid_pulling_and_serving(
    seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    seed = seeds.get(KIND)
    log_lines.lines.clear()
    calls: list[Any] = []

    def noting(config: Any) -> Any:
        calls.append(config)
        return config

    with source_of(seed.holding) as source:
        assert load(models.get(KIND), source, arguments={"hf_overrides": noting}).raw == seed.disk
    assert calls
    reason = "settings of the engine can't be compared"
    assert log_lines.one("default loader", "loads the target", reason)
    assert log_lines.one("does not serve its target", reason)


def test_settings_that_can_not_be_read_cost_the_pull_and_not_the_load(
    seeds: Seeds, models: ModelStore, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Settings:
        raise RuntimeError("a new kind of configuration")

    seed = seeds.get(KIND)
    log_lines.lines.clear()
    monkeypatch.setattr(inspect_engine, "settings_of", fails)
    with source_of(seed.holding) as source:
        assert load(models.get(KIND), source).raw == seed.disk
    reason = "the settings of the engine that decide tensors could not be read"
    assert log_lines.one("default loader", "loads the target", reason)
    assert log_lines.one("does not serve its target", reason)


def test_settings_are_read_before_the_model_is_built(
    models: ModelStore, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build changes the configuration. A server without sources asks for its identity after the build."""
    from netloader.vllm.load import examine_model

    log_lines.setLevel(logging.INFO)
    seen: list[str] = []

    def reading(engine: Engine) -> Settings:
        seen.append("settings")
        return Settings()

    def examining(model: Any) -> Any:
        seen.append("built")
        return named_raw_tensors(model)

    monkeypatch.setattr(inspect_engine, "_settings", reading)
    monkeypatch.setattr(examine_model, "named_raw_tensors", examining)
    load(models.get(KIND))
    assert seen[:2] == ["settings", "built"]
    assert seen.count("settings") == 1


# --- vllm-ascend ----------------------------------------------------------------------------------------------------


def of_ascend(folder: Path, **additional: Any) -> Settings:
    """What the keys of `additional_config` add to the settings of a plain engine."""
    usual, found = stated(folder), stated(folder, additional_config=additional)
    return Settings(
        {path: text for path, text in found.weights.items() if path not in usual.weights},
        {path: text for path, text in found.processed.items() if path not in usual.processed},
    )


def test_keys_of_vllm_ascend_are_stated_by_their_path(folder: Path) -> None:
    found = of_ascend(
        folder,
        finegrained_tp_config={"lmhead_tensor_parallel_size": 2, "mlp_tensor_parallel_size": 0},
        eplb_config={"num_redundant_experts": 4, "eplb_policy_type": 1},
        mix_placement=True,
        layer_sharding=["o_proj"],
        weight_nz_mode=2,
        enable_mlapo=False,
        ascend_log_path="/somewhere",
        dump_config={"any": {"thing": 1}},
    )
    start = "additional_config."
    assert found.weights == {
        f"{start}finegrained_tp_config.lmhead_tensor_parallel_size": "2",
        f"{start}eplb_config.num_redundant_experts": "4",
        f"{start}mix_placement": "1",
        f"{start}layer_sharding": '["o_proj"]',
    }
    assert found.processed == {f"{start}weight_nz_mode": "2", f"{start}enable_mlapo": "0"}
    assert of_ascend(folder, weight_nz_mode=1, enable_mlapo=True, mix_placement=False) == Settings()


def test_a_key_that_is_not_classed_counts_whatever_its_value(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text("{}")
    found = of_ascend(
        folder, invented=False, eplb_config={"invented": 0}, other={"inner": {"x": 1}}, empty={}, f=str(file)
    )
    start = "additional_config."
    values = {"invented": False, "eplb_config.invented": 0, "other.inner.x": 1, "empty": {}, "f": {}}
    assert found.weights == hidden({f"{start}{name}": value for name, value in values.items()})


def test_a_file_counts_by_its_contents(folder: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here.json", tmp_path / "there.json"

    def text(file: Path) -> str:
        found = of_ascend(folder, eplb_config={"expert_map_path": str(file)})
        return found.weights["additional_config.eplb_config.expert_map_path"]

    here.write_text(json.dumps({"layer_list": [list(range(40))]}))
    there.write_text(json.dumps({"layer_list": [list(range(40))]}, indent=2))
    assert text(here) == text(there)
    there.write_text(json.dumps({"layer_list": [list(range(1, 41))]}))
    assert text(here) != text(there)
    assert {text(here)[:8], text(there)[:8]} == {"blake2b:"}
    config = harness.engine_config(folder, additional_config={"eplb_config": {"expert_map_path": str(tmp_path / "no")}})
    unknown = settings_of(config, config.model_config, "target", folder).unknown
    assert f"additional_config.eplb_config.expert_map_path names {tmp_path / 'no'}, which can't be read" in unknown


def test_a_variable_of_vllm_ascend_stands_for_a_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ASCEND_ENABLE_NZ", "0")
    monkeypatch.setenv("VLLM_ASCEND_BALANCE_SCHEDULING", "1")
    assert stated(folder).processed["additional_config.weight_nz_mode"] == "0"
    given = stated(folder, additional_config={"weight_nz_mode": 1})
    assert "additional_config.weight_nz_mode" not in given.processed, "the key decides"
    before = stated(folder).weights
    monkeypatch.setenv("VLLM_ASCEND_INVENTED", "1")
    assert stated(folder).weights == {**before, **hidden({"VLLM_ASCEND_INVENTED": "1"})}


def test_a_configuration_of_another_kind_is_compared_by_its_hash_or_not_at_all(folder: Path) -> None:
    class Hashed:
        def compute_hash(self) -> str:
            return "abc"

    def change(value: object) -> Callable[[Any], None]:
        return lambda config: setattr(config, "additional_config", value)

    found = stated(folder, change(Hashed())).weights["additional_config"]
    assert found == hidden_text("additional_config", "abc")
    config = harness.engine_config(folder)
    config.additional_config = object()
    assert "object in additional_config" in settings_of(config, config.model_config, "target", folder).unknown


# --- rows of a classifier, which a tokenizer chooses ----------------------------------------------------------------


def a_tokenizer(folder: Path, *words: str) -> Path:
    """A tokenizer on disk whose ids are the places of `words`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder.mkdir()
    vocabulary = {word: place for place, word in enumerate(["[UNK]", *words])}
    Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


TOKENIZER = "model_config.tokenizer"


@pytest.mark.parametrize("method", ["from_2_way_softmax", "no_post_processing", None])
def test_rows_that_a_tokenizer_chooses_are_stated_by_the_ids_of_their_tokens(
    method: str | None, folder: Path, tmp_path: Path
) -> None:
    """vLLM makes `score.weight` from rows of the output head: equal `hf_overrides` give other rows."""

    def text(tokenizer: Path) -> str:
        def change(config: Any) -> None:
            model = config.model_config
            model.tokenizer, model.skip_tokenizer_init = str(tokenizer), False
            owner = model.hf_text_config if method == "no_post_processing" else model.hf_config
            owner.method, owner.classifier_from_token = method, ["no", "yes"]

        return stated(folder, change).weights[TOKENIZER]

    one = a_tokenizer(tmp_path / "one", "no", "yes")
    assert text(one) == '{"no": 1, "yes": 2}'
    assert text(a_tokenizer(tmp_path / "two", "yes", "no")) == '{"no": 2, "yes": 1}'
    assert text(a_tokenizer(tmp_path / "three", "no", "yes", "more")) == text(one), "only these ids decide"
    assert TOKENIZER not in stated(folder, tokenizer=str(one)).weights


def test_without_the_ids_of_its_tokens_such_a_model_is_not_comparable(folder: Path, tmp_path: Path) -> None:
    config = harness.engine_config(folder)
    config.model_config.tokenizer = str(tmp_path / "none")
    config.model_config.hf_config.method = "from_2_way_softmax"
    config.model_config.hf_config.classifier_from_token = ["no", "yes"]
    unknown = settings_of(config, config.model_config, "target", folder).unknown
    assert f"the tokenizer {tmp_path / 'none'} does not give the ids of ['no', 'yes']" in unknown


def test_only_the_tokenizer_decides_the_classifier(models: ModelStore, log_lines: LogLines, tmp_path: Path) -> None:
    """Why its ids are stated. The model itself is served: `tests/vllm/test_unbuilt.py` pulls it."""
    overrides = {
        "architectures": ["LlamaForSequenceClassification"],
        "method": "from_2_way_softmax",
        "classifier_from_token": ["no", "yes"],
    }

    def loaded(tokenizer: Path) -> dict[str, str]:
        log_lines.lines.clear()
        given = {"hf_overrides": overrides, "runner": "pooling", "tokenizer": str(tokenizer)}
        raw = load(models.get("llama-tied"), arguments=given).raw
        assert log_lines.one("serves target at", "raw layout")
        return raw

    one = loaded(a_tokenizer(tmp_path / "one", "no", "yes"))
    other = loaded(a_tokenizer(tmp_path / "other", "yes", "no"))
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == ["score.weight"]
