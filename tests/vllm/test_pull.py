"""A pulled model equals that of a disk load, bit for bit, without a weight file at the client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from netloader import sync
from netloader.vllm.serve import serving
from netloader.vllm.serve.address_file import SERVING_PATTERN
from tests.models import ModelStore
from tests.vllm import harness
from tests.vllm.pulls import DRAFT, NAME, LogLines, Seeds, extra, load, pull, source_of
from tests.vllm.releases import LOOKS_FOR_HEAD

pytestmark = pytest.mark.usefixtures("needs_vllm")

MATRIX: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("llama-bf16", {}),
    "fp16": ("llama-fp16", {}),
    "fp32": ("llama-fp32", {}),
    "tied": ("llama-tied", {}),
    "untied by the file": ("llama-untied-by-file", {}),
    "w8a8, kept in dram": ("llama-w8a8", {"INT8_CACHE": "dram"}),
    "w8a8, kept in hbm": ("llama-w8a8", {"INT8_CACHE": "hbm"}),
    "moe": ("qwen3-moe", {}),
}


@pytest.mark.parametrize("case", MATRIX)
def test_a_pulled_model_equals_one_loaded_from_disk(
    case: str, seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    kind, settings = MATRIX[case]
    seed = seeds.get(kind, **settings)
    assert seed.loaded.raw == seed.disk
    log_lines.lines.clear()
    with source_of(seed.holding) as source:
        pulled = pull(models.bare(kind), source)
    assert len(pulled.raw) > 10
    assert pulled.raw == seed.disk
    assert f"; root {seed.holding.announcement.root}" in log_lines.one("rank 0: target: pulled ")
    assert not log_lines.with_part("default loader")
    if kind == "llama-untied-by-file" and LOOKS_FOR_HEAD:
        assert log_lines.one("output embedding of its own")


# One tensor per kind of layer.
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama-bf16", "model.embed_tokens.weight"),
        ("llama-bf16", "model.layers.3.self_attn.k_proj.weight"),
        ("llama-bf16", "model.layers.2.mlp.down_proj.weight"),
        ("llama-bf16", "lm_head.weight"),
        ("llama-w8a8", "model.layers.1.self_attn.q_proj.weight"),
        ("llama-w8a8", "model.layers.1.mlp.gate_proj.weight_scale"),
        ("qwen3-moe", "model.layers.1.mlp.gate.weight"),
        ("qwen3-moe", "model.layers.0.mlp.experts.5.down_proj.weight"),
    ],
)
def test_one_changed_weight_at_the_seed_is_one_changed_weight_at_the_client(
    kind: str, name: str, seeds: Seeds, models: ModelStore
) -> None:
    """The comparison above can fail, for every kind of layer."""
    settings = {"INT8_CACHE": "dram"} if kind == "llama-w8a8" else {}
    seed = seeds.changed(kind, name, **settings)
    with source_of(seed.holding) as source:
        pulled = pull(models.bare(kind), source)
    assert pulled.raw == seed.loaded.raw
    differing = [tensor for tensor, digest in pulled.raw.items() if seed.disk[tensor] != digest]
    assert differing
    assert len(differing) < 3, "the other tensors are those of the unchanged model"


def test_a_client_serves_what_it_pulled(seeds: Seeds, models: ModelStore, tmp_path: Path, log_lines: LogLines) -> None:
    seed = seeds.get("llama-bf16")
    prefix = str(tmp_path / "rank")
    with source_of(seed.holding) as source:
        first = load(models.bare("llama-bf16"), source, OUTPUT_PREFIX=prefix)
    server = serving.running_server()
    assert server is not None
    assert (tmp_path / "rank0.txt").read_text(encoding="ascii") == server.address
    assert f"serves target at {server.address}" in log_lines.one(f"root {seed.holding.announcement.root})")
    second = pull(models.bare("llama-bf16"), server.address)
    assert first.raw == second.raw == seed.disk
    serving.stop_server()
    assert not (tmp_path / "rank0.txt").exists()


def test_loading_again_in_one_process_replaces_what_is_served(models: ModelStore, log_lines: LogLines) -> None:
    first = load(models.get("llama-bf16"))
    server = serving.running_server()
    assert server is not None
    roots = [sync.probe(server.address).announcement.root]
    load(models.get("llama-bf16-other"))
    assert serving.running_server() is server
    roots.append(sync.probe(server.address).announcement.root)
    assert roots[0] != roots[1]
    assert log_lines.one("is replaced by the one just loaded")
    assert first.model is not None


def test_a_draft_model_is_served_at_the_port_of_its_target_and_pulled_from_it(
    models: ModelStore, log_lines: LogLines
) -> None:
    speculative = {"speculative_config": {"model": str(models.get("draft")), **DRAFT}}
    config = harness.engine_config(models.get("llama-bf16"), load_format="netloader", extra=extra(), **speculative)
    target = harness.load(config)
    server = serving.running_server()
    assert server is not None
    with pytest.raises(Exception, match="loaded after its target"):
        sync.probe(server.address, role="draft")
    draft = harness.load(config, role="draft")
    assert serving.running_server() is server
    assert log_lines.one("serves target at", server.address)
    assert log_lines.one("serves draft at", server.address)

    settings = extra([server.address], SERVE=False)
    config = harness.engine_config(models.get("llama-bf16"), load_format="netloader", extra=settings, **speculative)
    assert harness.load(config).raw == target.raw
    assert harness.load(config, role="draft").raw == draft.raw
    assert log_lines.one("rank 0: draft: pulled")
    # MODEL is the name of the target only; a draft has its own name.
    assert sync.probe(server.address, role="target").announcement.identity.model == NAME
    assert sync.probe(server.address, role="draft").announcement.identity.model == str(models.get("draft"))


def test_a_draft_model_that_the_source_does_not_have_is_loaded_by_default(
    seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    seed = seeds.get("llama-bf16")
    speculative = {"speculative_config": {"model": str(models.get("draft")), **DRAFT}}
    with source_of(seed.holding) as source:
        settings = extra([source], SERVE=False)
        config = harness.engine_config(
            models.bare("llama-bf16"), load_format="netloader", extra=settings, **speculative
        )
        assert harness.load(config).raw == seed.disk
        draft = harness.load(config, role="draft")
    assert draft.raw == seeds.disk("draft")
    assert "nothing is held for draft" in log_lines.one("default loader", "loads the draft")


def test_a_server_keeps_no_model_alive(models: ModelStore, seeds: Seeds, log_lines: LogLines) -> None:
    """vLLM may drop weights later (embeddings of a draft). Then the server answers "gone"."""
    import gc

    load(models.get("llama-fp16"))  # nothing refers to the model any more
    gc.collect()
    server = serving.running_server()
    assert server is not None
    assert pull(models.get("llama-fp16"), server.address).raw == seeds.disk("llama-fp16")
    assert "was dropped by its owner" in log_lines.one("default loader", "could not pull")


def test_weights_that_are_not_kept_are_freed_by_post_processing(
    models: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    from netloader.vllm.load import loading
    from netloader.vllm.serve import recording
    from netloader.vllm.serve.choose_layout import Choice, choose_layout
    from netloader.vllm.serve.recording import Record, record

    raw: dict[str, weakref.ref[torch.Tensor]] = {}
    alive: list[str] = []

    def after_loading(model: torch.nn.Module, *arguments: Any, **options: Any) -> Record:
        made = record(model, *arguments, **options)
        raw.update((name, weakref.ref(tensor)) for name, tensor in harness.named_tensors(model))
        return made

    def after_processing(*arguments: Any) -> Choice:
        alive.extend(name for name, tensor in raw.items() if tensor() is not None)
        return choose_layout(*arguments)

    monkeypatch.setattr(recording, "record", after_loading)
    monkeypatch.setattr(loading, "choose_layout", after_processing)
    load(models.get("llama-w8a8"))
    assert "model.embed_tokens.weight" in alive
    assert not [name for name in alive if "proj.weight" in name], "the int8 weights that were replaced"


def test_the_address_in_the_log_can_be_found_by_the_pattern(models: ModelStore, log_lines: LogLines) -> None:
    import re

    load(models.get("draft"))
    found = [match for line in log_lines.lines if (match := re.search(SERVING_PATTERN, line))]
    assert [(match["rank"], match["role"]) for match in found] == [("0", "target")]
