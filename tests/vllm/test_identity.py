"""The identity of a model and the place of a rank, from vLLM's configuration, for all parallel sizes."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.distributed

from netloader.vllm.load.tied_embeddings import could_adopt, tied_by_files
from netloader.vllm.model import identity as identities
from netloader.vllm.model.quantisation import quantisation_of
from netloader.vllm.model.topology import Topology, topology_of
from tests.models import ModelStore
from tests.vllm import harness
from tests.vllm.releases import LOOKS_FOR_HEAD

DENSE, MOE = SimpleNamespace(is_moe=False), SimpleNamespace(is_moe=True)


def place(
    monkeypatch: pytest.MonkeyPatch,
    model: Any,
    *,
    distributed: int = 0,
    tensor: tuple[int, int] = (1, 0),
    pipeline: tuple[int, int] = (1, 0),
    context: tuple[int, int] = (1, 0),
    **parallel: Any,
) -> Topology:
    """The topology of a worker; each group as its size and this worker's place in it."""

    def group(which: tuple[int, int]) -> Any:
        return lambda: SimpleNamespace(world_size=which[0], rank_in_group=which[1])

    monkeypatch.setattr(torch.distributed, "get_rank", lambda: distributed)
    for name, which in {"get_tp_group": tensor, "get_pp_group": pipeline, "get_pcp_group": context}.items():
        monkeypatch.setattr(vllm.distributed, name, group(which))
    usual: dict[str, Any] = {
        "data_parallel_size": 1,
        "data_parallel_index": 0,
        "data_parallel_rank": 0,
        "prefill_context_parallel_size": context[0],
        "world_size": tensor[0] * pipeline[0] * context[0],
        "enable_expert_parallel": False,
        "expert_placement_strategy": "linear",
    }
    # This is the target's configuration. The model may be a draft, so nothing may read it.
    other = MOE if model is DENSE else DENSE
    config = SimpleNamespace(parallel_config=SimpleNamespace(**{**usual, **parallel}), model_config=other)
    return topology_of(config, model)


def experts(found: Topology) -> tuple[int, int, str]:
    return found.ep_size, found.ep_rank, found.experts


def test_ranks_of_one_engine_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = place(monkeypatch, DENSE, distributed=5, tensor=(4, 1), pipeline=(2, 1))
    assert found.rank == 5
    assert (found.tp_size, found.tp_rank, found.pp_size, found.pp_rank) == (4, 1, 2, 1)
    assert experts(found) == (1, 0, "")


@pytest.mark.parametrize("replica", [0, 1, 2])
def test_replicas_of_a_dense_model_count_on(replica: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In vLLM each is an engine of its own, with size 1 and ranks from 0. Only the index differs."""
    ranks = [
        place(monkeypatch, DENSE, distributed=rank, tensor=(2, rank), data_parallel_index=replica).rank
        for rank in (0, 1)
    ]
    assert ranks == [2 * replica, 2 * replica + 1]


def test_replicas_of_a_moe_model_are_one_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """They exchange tokens, so torch's rank counts all of them; without expert parallelism experts are cut."""
    parallel: dict[str, Any] = {"data_parallel_size": 2, "data_parallel_index": 1, "data_parallel_rank": 1}
    found = place(monkeypatch, MOE, distributed=3, tensor=(2, 1), **parallel)
    assert found.rank == 3
    assert experts(found) == (1, 0, "cut 3 of 4")
    whole = place(monkeypatch, DENSE, distributed=3, tensor=(2, 1), **parallel)
    assert experts(whole) == (1, 0, ""), "a dense draft beside a MoE target holds the same in every replica"


def test_expert_parallelism_names_size_rank_and_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    found = place(monkeypatch, MOE, distributed=1, tensor=(2, 1), enable_expert_parallel=True)
    assert experts(found) == (2, 1, "linear")
    spread = place(
        monkeypatch,
        MOE,
        distributed=2,
        tensor=(2, 0),
        enable_expert_parallel=True,
        expert_placement_strategy="round_robin",
        data_parallel_size=2,
        data_parallel_index=1,
        data_parallel_rank=1,
    )
    assert experts(spread) == (4, 2, "round_robin")
    assert experts(place(monkeypatch, MOE, enable_expert_parallel=True)) == (1, 0, ""), "a worker alone has all"


def test_prefill_context_ranks_lie_between_replicas_and_tensor_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [
        place(
            monkeypatch,
            MOE,
            distributed=4 * replica + 2 * context + tensor,
            tensor=(2, tensor),
            context=(2, context),
            enable_expert_parallel=True,
            data_parallel_size=2,
            data_parallel_rank=replica,
        )
        for replica in (0, 1)
        for context in (0, 1)
        for tensor in (0, 1)
    ]
    assert [found.rank for found in seen] == list(range(8))
    assert [experts(found) for found in seen] == [(8, rank, "linear") for rank in range(8)]


def test_experts_that_are_cut_over_tensor_ranks_alone_need_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert experts(place(monkeypatch, MOE, distributed=1, tensor=(2, 1))) == (1, 0, "")


# --- quantisation ---------------------------------------------------------------------------------------------------


def model(
    config: Any = None, *, method: str | None = "compressed-tensors", path: str = "/nowhere", **more: Any
) -> SimpleNamespace:
    hf_config = SimpleNamespace(**({} if config is None else {"quantization_config": config}))
    usual: dict[str, Any] = {"quantization": method, "hf_overrides": {}, "quantization_config": None, "model": path}
    return SimpleNamespace(**{**usual, "hf_config": hf_config, **more})


CONFIG = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"]}}, "ignore": ["a"]}


def text_of(model: Any, cache: Any) -> str:
    return quantisation_of(model, cache).text


def test_a_model_without_quantisation_has_an_empty_text() -> None:
    assert text_of(model(method=None), None) == ""
    assert text_of(model(method=None), SimpleNamespace(cache_dtype="auto")) == ""


def test_the_same_configuration_is_the_same_text_however_it_is_written() -> None:
    text = text_of(model(CONFIG), None)
    assert len(text) == 32
    assert text_of(model(dict(reversed(CONFIG.items()))), None) == text
    as_object = SimpleNamespace(to_dict=lambda: CONFIG)
    assert text_of(model(as_object), None) == text
    # vLLM writes these two into the model's configuration while it starts.
    assert text_of(model({**CONFIG, "total_num_heads": 4, "total_num_kv_heads": 2}), None) == text
    assert text_of(model({**CONFIG, "ignore": ["b"]}), None) != text


def test_it_is_found_wherever_a_model_may_have_it() -> None:
    text = text_of(model(CONFIG), None)
    nested = SimpleNamespace(text_config=SimpleNamespace(quantization_config=CONFIG))
    assert text_of(model(hf_config=nested), None) == text
    old = SimpleNamespace(compression_config=CONFIG)
    assert text_of(model(hf_config=old), None) == text


class _Kind(enum.Enum):
    INT8 = 1


@dataclass
class _Arguments:
    kind: _Kind = _Kind.INT8
    names: set[str] = field(default_factory=lambda: {"b", "a", "c"})
    dtype: torch.dtype = torch.int8
    function: Any = test_a_model_without_quantisation_has_an_empty_text


def test_what_the_user_put_over_it_counts(tmp_path: Path) -> None:
    text = text_of(model(CONFIG), None)
    argued = text_of(model(CONFIG, quantization_config=_Arguments()), None)
    assert argued != text
    assert argued == text_of(model(CONFIG, quantization_config=_Arguments(names={"c", "b", "a"})), None)
    assert argued != text_of(model(CONFIG, quantization_config=_Arguments(dtype=torch.uint8)), None)
    told = model(CONFIG, hf_overrides={"quantization_config_dict_json": '{"a": 1}'})
    assert text_of(told, None) != text
    file = tmp_path / "quantisation.json"
    seen = set()
    for contents in ('{"a": 1}', '{"a": 2}', "no json"):
        file.write_text(contents)
        told = model(CONFIG, hf_overrides={"quantization_config_file": str(file)})
        seen.add(text_of(told, None))
    assert len(seen | {text}) == 4
    assert text_of(model(CONFIG, hf_overrides=lambda config: config), None) == text


def test_the_files_that_vllm_reads_instead_count(tmp_path: Path) -> None:
    """Where config.json has nothing, vLLM looks for a file whose name belongs to the method."""
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    one = text_of(model(method="modelopt", path=str(tmp_path)), None)
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    two = text_of(model(method="modelopt", path=str(tmp_path)), None)
    assert "" not in {one, two}
    assert one != two
    assert text_of(model(CONFIG, path=str(tmp_path)), None) == text_of(model(CONFIG), None)


def test_the_type_of_the_kv_cache_is_named() -> None:
    cache = SimpleNamespace(cache_dtype="fp8_e4m3")
    assert text_of(model(method=None), cache) == "kv-cache fp8_e4m3"
    assert text_of(model(CONFIG), cache).endswith(", kv-cache fp8_e4m3")


def test_what_vllm_makes_of_a_real_checkpoint_is_one_text(needs_vllm: None, models: ModelStore) -> None:
    texts = []
    for _ in range(2):
        config = harness.engine_config(models.get("llama-w8a8"))
        texts.append(text_of(config.model_config, config.cache_config))
        harness.load(config)
        texts.append(text_of(config.model_config, config.cache_config))
    assert len(set(texts)) == 1, "the same before and after the model is built"
    raw = json.loads((models.get("llama-w8a8") / "config.json").read_text())["quantization_config"]
    assert texts[0] == text_of(model(raw), None)


# --- fingerprint ----------------------------------------------------------------------------------------------------


def test_files_are_found_in_a_folder_and_in_the_cache_of_a_hub(
    models: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def fingerprint(name: str) -> str:
        return identities.fingerprint_of_model(SimpleNamespace(model=name, revision=None))

    folder = models.get("draft")
    known = fingerprint(str(folder))
    assert len(known) == 32
    assert fingerprint(str(models.bare("draft"))) == ""
    assert fingerprint("some/model-nobody-fetched") == ""
    assert fingerprint("s3://bucket/model") == ""
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(folder / "config.json"))
    assert fingerprint("some/model") == known


# --- tying ----------------------------------------------------------------------------------------------------------


def test_a_release_that_never_looks_for_an_output_embedding_takes_the_word_of_the_config(
    models: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.transformers_utils import config

    def tied(kind: str, *, bare: bool = False) -> bool | None:
        folder = models.bare(kind) if bare else models.get(kind)
        told = SimpleNamespace(tie_word_embeddings=kind != "draft")
        return tied_by_files(SimpleNamespace(hf_config=told, model=str(folder), revision=None))

    if LOOKS_FOR_HEAD:
        assert (tied("draft"), tied("llama-tied"), tied("llama-tied", bare=True)) == (False, True, None)
    monkeypatch.delattr(config, "checkpoint_has_lm_head", raising=False)
    assert (tied("draft"), tied("llama-tied"), tied("llama-tied", bare=True)) == (False, True, True)
    assert not could_adopt(SimpleNamespace())
