"""The processed layout: post-processed weights are pulled exactly as they are, or are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from netloader import sync
from netloader.errors import NetloaderError
from netloader.tensors import mappings
from netloader.transports.faults import Fault, FaultKind
from netloader.vllm.load import agree_ranks, processed_pull
from netloader.vllm.load.inspect_engine import NothingPulled
from netloader.vllm.model import post_processing
from netloader.vllm.model.processed import FACTS, hold_processed, survey
from netloader.vllm.serve import serving
from tests.models import ModelStore, change_weight
from tests.vllm import harness
from tests.vllm.pulls import LogLines, load, offered, pull, source_of
from tests.vllm.releases import KNOWS_PROCESSED

pytestmark = [
    pytest.mark.usefixtures("needs_vllm"),
    pytest.mark.skipif(not KNOWS_PROCESSED, reason="this vLLM does not know processed weights"),
]


@pytest.fixture(scope="module")
def folder(needs_vllm: None, models: ModelStore) -> Path:
    import tests.vllm.processed_method  # noqa: F401 - importing it is what registers it

    return models.get("processed")


@pytest.fixture(scope="module")
def bare(folder: Path, models: ModelStore) -> Path:
    return models.bare("processed")


@pytest.fixture
def no_rotary(needs_vllm: None) -> Iterator[Callable[[], None]]:
    """Forgets the rotary embeddings that vLLM shares among the models of a process, as if each had its own."""
    from vllm.model_executor.layers import rotary_embedding

    rotary_embedding._ROPE_DICT.clear()
    yield rotary_embedding._ROPE_DICT.clear
    rotary_embedding._ROPE_DICT.clear()


def rotary(model: Any) -> torch.Tensor:
    cache: torch.Tensor = model.model.layers[0].self_attn.rotary_emb.cos_sin_cache
    return cache


@pytest.fixture
def variant() -> Iterator[Any]:
    from tests.vllm import processed_method

    yield processed_method.VARIANT
    processed_method.VARIANT.now = "good"


def digests(model: torch.nn.Module) -> dict[str, str]:
    return {name: harness.tensor_digest(tensor) for name, tensor in survey(model, {}).tensors.items()}


def test_a_model_pulled_processed_is_the_one_that_a_disk_load_makes(
    folder: Path, bare: Path, log_lines: LogLines
) -> None:
    disk = harness.load(harness.engine_config(folder)).model
    loaded, holding = offered(folder, {})
    assert log_lines.one("serves target at", "processed layout")
    assert log_lines.one("no raw layout", "set INT8_CACHE to dram or hbm on the server")
    assert holding.announcement.identity.layout == "processed"
    with source_of(holding) as source:
        pulled = pull(bare, source).model
    assert not log_lines.with_part("default loader", "could not pull")
    expected = digests(disk)
    assert digests(loaded.model) == expected
    assert digests(pulled) == expected
    names = {name.rpartition("o_proj.")[2] for name in expected if "layers.0.self_attn.o_proj." in name}
    assert {"weight", "scale", "helper.row_sums", "helper.same_scale", "placeholder"} <= names
    assert not pulled.get_parameter("model.layers.0.self_attn.o_proj.weight").is_contiguous()
    layer = "model.layers.0.self_attn.o_proj"
    assert pulled.get_submodule(layer).largest == disk.get_submodule(layer).largest


def test_an_empty_placeholder_on_another_device_costs_nothing(
    folder: Path, bare: Path, variant: Any, log_lines: LogLines
) -> None:
    """A method for an accelerator may have its placeholders on the host."""
    variant.now = "empty elsewhere"
    _loaded, holding = offered(folder, {})
    assert log_lines.one("serves target at", "processed layout")
    with source_of(holding) as source:
        pulled = pull(bare, source).model
    assert digests(pulled) == digests(harness.load(harness.engine_config(folder)).model)
    assert pulled.get_submodule("model.layers.0.mlp.down_proj").elsewhere.device.type == "meta"


def test_one_changed_weight_at_the_seed_makes_the_comparison_fail(folder: Path, bare: Path, tmp_path: Path) -> None:
    """The comparison above can fail, also for tensors that are not parameters."""
    expected = digests(harness.load(harness.engine_config(folder)).model)
    changed = change_weight(folder, tmp_path / "changed", "model.layers.1.mlp.down_proj.weight")
    loaded, holding = offered(changed, {})
    with source_of(holding) as source:
        found = digests(pull(bare, source).model)
    assert found == digests(loaded.model)
    wrong = {name for name in found if found[name] != expected[name]}
    start = "model.layers.1.mlp.down_proj."
    assert wrong == {start + leaf for leaf in ("weight", "scale", "helper.row_sums", "helper.same_scale")}


def test_one_byte_changed_in_a_derived_tensor_is_noticed(folder: Path, bare: Path, log_lines: LogLines) -> None:
    loaded, holding = offered(folder, {})
    scale: Any = loaded.model.get_submodule("model.layers.0.mlp.down_proj").scale
    scale.view(torch.uint8)[5] ^= 1
    with source_of(holding) as source, pytest.raises(RuntimeError, match="Cannot find any model weights"):
        pull(bare, source)
    assert log_lines.one("loads the target: could not pull: processed weights", "arrived with digest")


def test_a_failed_pull_ends_in_what_a_clean_load_gives(folder: Path, log_lines: LogLines) -> None:
    disk = harness.load(harness.engine_config(folder))
    loaded, holding = offered(folder, {})
    assert loaded.model is not None
    assert len(holding.announcement.digests) > 5
    with source_of(holding, Fault(FaultKind.CORRUPT, 5, times=None)) as source:
        pulled = pull(folder, source)
    assert log_lines.one("the model is built anew")
    assert log_lines.one("default loader", "could not pull: processed weights")
    assert pulled.raw == disk.raw
    assert digests(pulled.model) == digests(disk.model)


def test_a_client_serves_the_processed_weights_that_it_pulled(folder: Path, bare: Path, log_lines: LogLines) -> None:
    seed, holding = offered(folder, {})
    with source_of(holding) as source:
        first = load(bare, source)
    server = serving.running_server()
    assert server is not None
    second = pull(bare, server.address)
    assert digests(first.model) == digests(second.model) == digests(seed.model)
    assert len(log_lines.with_part("serves target at", f"root {holding.announcement.root})")) == 2


def test_another_engine_version_is_refused(folder: Path, log_lines: LogLines) -> None:
    disk = harness.load(harness.engine_config(folder))
    _seed, holding = offered(folder, {})
    with source_of(holding, engine="vllm 0.0.1") as source:
        pulled = pull(folder, source)
    assert "engine is 'vllm 0.0.1'" in log_lines.one("default loader", "could not pull")
    assert digests(pulled.model) == digests(disk.model)


def test_a_setting_that_decides_processed_weights_is_refused(folder: Path, bare: Path, log_lines: LogLines) -> None:
    disk = harness.load(harness.engine_config(folder))
    _seed, holding = offered(folder, {}, {"kernel_config": {"moe_backend": "triton"}})
    log_lines.lines.clear()
    with source_of(holding) as source:
        assert digests(pull(folder, source).model) == digests(disk.model)
        line = log_lines.one("default loader", "could not pull")
        assert "kernel_config.moe_backend is 'triton' at the server and 'not set' at the client" in line
        assert not log_lines.with_part("TRANSFER")
        log_lines.lines.clear()
        same = load(bare, source, SERVE=False, arguments={"kernel_config": {"moe_backend": "triton"}})
    assert digests(same.model) == digests(disk.model)
    assert not log_lines.with_part("default loader")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("no flag", "Method does not declare supports_pre_processed_weights"),
        ("handle", "handle: the number"),
        ("emptied", "lm_head.weight: it had 262144 bytes, and is empty now"),
        ("closure", "multiply<closure>.hidden: a function keeps a tensor"),
        ("elsewhere", "elsewhere: it is on meta, apart from the other tensors"),
        ("opaque", "opaque: builtins.object can't be looked into (a handle)"),
    ],
)
def test_what_is_no_tensor_with_a_name_is_refused(
    broken: str, reason: str, folder: Path, variant: Any, log_lines: LogLines
) -> None:
    variant.now = broken
    load(folder)
    line = log_lines.one("does not serve its target", "its processed weights are not exact either")
    assert reason in line
    assert "set INT8_CACHE to dram or hbm on the server" in line
    assert not log_lines.with_part("serves target")


def test_a_low_number_is_an_address_where_the_heap_is_low(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an interpreter that was linked to a fixed address."""
    (tmp_path / "maps").write_bytes(
        b"00400000-0041f000 r--p 00000000 fe:00 26723        /usr/bin/python3.11\n"
        b"05086000-0a486000 rw-p 00000000 00:00 0            [heap]\n"
        b"7fa185fe7000-7fa185fe8000 r--p 00000000 fe:00 2    /usr/lib/[heap].so\n"
    )
    layer: Any = torch.nn.Linear(2, 2)
    layer.below, layer.inside, layer.past = 0x5085FFF, 0xA3CDD80, 0xA486000
    layer.yes = True
    monkeypatch.setattr(mappings, "_MAPS", tmp_path / "maps")
    found = survey(layer, {}).problems
    assert found == [f"inside: the number {layer.inside} may be the address of something (a handle)"]
    monkeypatch.setattr(mappings, "_MAPS", tmp_path / "none")
    assert survey(layer, {}).problems == []


def test_a_number_that_post_processing_does_not_compute_again_is_refused(
    folder: Path, variant: Any, log_lines: LogLines
) -> None:
    disk = harness.load(harness.engine_config(folder))
    variant.now = "number"
    _seed, holding = offered(folder, {})
    with source_of(holding) as source:
        pulled = pull(folder, source)
    line = log_lines.one("default loader", "plain values differ from the source's and are not recomputed")
    assert "largest" in line
    assert pulled.raw == disk.raw
    assert {n: d for n, d in digests(pulled.model).items() if n != FACTS} == {
        n: d for n, d in digests(disk.model).items() if n != FACTS
    }


@pytest.mark.parametrize("why", ["damaged", "refused", "ranks disagree", "no fallback"])
def test_a_pull_that_is_not_kept_leaves_nothing_in_what_models_share(
    why: str,
    folder: Path,
    variant: Any,
    no_rotary: Callable[[], None],
    log_lines: LogLines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rotary embeddings outlive a model: the one that is built next, or the target of a draft, computes with them."""
    clean = rotary(harness.load(harness.engine_config(folder)).model).clone()
    if why == "refused":
        variant.now = "number"
    no_rotary()
    seed, holding = offered(folder, {})
    rotary(seed.model).mul_(2)
    offer, reason = hold_processed(seed.model, holding.announcement.identity, {})
    assert offer is not None, reason
    no_rotary()
    live = harness.load(harness.engine_config(folder)).model
    if why in ("ranks disagree", "no fallback"):
        monkeypatch.setattr(agree_ranks, "disagreement", lambda _: "another rank has no source")
    with source_of(holding if why == "damaged" else offer) as source:
        if why == "no fallback":
            with pytest.raises(NothingPulled, match="another rank has no source"):
                pull(folder, source, FALLBACK=False)
        else:
            pulled = pull(folder, source).model
            assert log_lines.one("the model is built anew")
            assert rotary(pulled) is rotary(live), "vLLM shares it"
    assert torch.equal(rotary(live), clean)


# --- a client whose structure differs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("no flag", "weights here are not all tensors with names: model.embed_tokens: Method does not declare"),
        ("handle", "weights here are not all tensors with names: model.embed_tokens.handle: the number"),
        ("wide", "helper.row_sums: dtype is 'float64' here and 'float32' at the server"),
        ("apart", "tensors differ from what the server holds"),
        ("again", "post-processing changed tensors that were pulled: lm_head."),
        ("more", "post-processing left other plain values than before: lm_head.times_processed"),
    ],
)
def test_a_client_with_a_different_structure_pulls_no_processed_weights(
    broken: str, reason: str, folder: Path, variant: Any, log_lines: LogLines
) -> None:
    _seed, holding = offered(folder, {})
    variant.now = broken
    disk = harness.load(harness.engine_config(folder))
    with source_of(holding) as source:
        pulled = pull(folder, source)
    assert reason in log_lines.one("default loader", "could not pull: processed weights: ")
    assert pulled.raw == disk.raw
    ours, theirs = digests(pulled.model), digests(disk.model)
    if broken == "handle":
        # The handle is an address, and one of the plain values.
        del ours[FACTS], theirs[FACTS]
    assert ours == theirs


def test_an_engine_without_support_pulls_no_processed_weights(
    folder: Path, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = harness.load(harness.engine_config(folder))
    _seed, holding = offered(folder, {})
    monkeypatch.setattr(post_processing, "possible", lambda: False)
    with source_of(holding) as source:
        assert pull(folder, source).raw == disk.raw
    line = log_lines.one("default loader", "could not pull: processed weights: ")
    assert "this vLLM does not know processed weights (use a newer vLLM, or a raw source)" in line


def ascend_process_weights_after_loading(*_: Any) -> None:
    """As newer releases of vllm-ascend put one in place of vLLM's: it heeds no mode."""


def test_a_function_in_place_of_vllms_is_refused_because_it_would_process_twice(
    folder: Path, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.model_loader import utils

    disk = harness.load(harness.engine_config(folder))
    _seed, holding = offered(folder, {})
    monkeypatch.setattr(utils, "process_weights_after_loading", ascend_process_weights_after_loading)
    with source_of(holding) as source:
        assert pull(folder, source).raw == disk.raw
    line = f"{__name__}.ascend_process_weights_after_loading replaces vLLM's post-processing"
    assert log_lines.one("default loader", "could not pull: processed weights: ", line)
    load(folder)
    assert log_lines.one("does not serve its target", line)


def test_a_method_that_only_inherits_the_flag_is_refused(
    folder: Path, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It declares nothing about the post-processing that it has put in place of that of its base."""
    from vllm.model_executor.layers.linear import LinearMethodBase

    from tests.vllm.processed_method import Method

    monkeypatch.setattr(LinearMethodBase, "supports_pre_processed_weights", True)
    monkeypatch.delattr(Method, "supports_pre_processed_weights")
    load(folder)
    assert log_lines.one("does not serve its target", "Method only inherits supports_pre_processed_weights")


def test_weights_that_change_after_they_were_taken_over_end_the_load(
    folder: Path, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM is not known to do this. A model that differs from what was pulled must not run."""
    from vllm.model_executor.model_loader import base_loader

    _seed, holding = offered(folder, {})
    process = base_loader.process_weights_after_loading

    def and_change(model: torch.nn.Module, *arguments: Any) -> None:
        process(model, *arguments)
        model.get_parameter("model.norm.weight").data[0] += 1

    monkeypatch.setattr(base_loader, "process_weights_after_loading", and_change)
    with (
        source_of(holding) as source,
        pytest.raises(processed_pull.NotAdopted, match="post-processing changed tensors"),
    ):
        load(bare, source)
    server = serving.running_server()
    assert server is not None
    with pytest.raises(NetloaderError, match="the model could not be loaded: post-processing changed tensors"):
        sync.probe(server.address)


# --- several names, several ranks -----------------------------------------------------------------------------------


def test_tied_weights_and_aliases_are_shared_at_the_client_too(
    folder: Path, models: ModelStore, log_lines: LogLines
) -> None:
    disk = harness.load(harness.engine_config(models.get("processed-tied"))).model
    loaded, holding = offered(models.get("processed-tied"), {})
    shared = {spec.name: spec.alias_of for spec in holding.announcement.manifest.tensors if spec.alias_of}
    assert shared["lm_head.weight"] == "model.embed_tokens.weight"
    assert shared["lm_head.scale"] == "model.embed_tokens.scale"
    layer = "model.layers.0.mlp.down_proj"
    assert {shared[f"{layer}.helper.same_scale"]} == {f"{layer}.scale"}
    with source_of(holding) as source:
        pulled = pull(models.bare("processed-tied"), source).model
    assert not log_lines.with_part("default loader", "could not pull")
    assert digests(pulled) == digests(disk) == digests(loaded.model)
    found = survey(pulled, {})
    for name, owner in shared.items():
        assert found.tensors[name].data_ptr() == found.tensors[owner].data_ptr(), name
    view: Any = pulled.get_submodule(layer)
    assert view.helper.first_scale.data_ptr() == view.scale.data_ptr()
    assert f"{layer}.helper.first_scale" in found.facts


def test_a_folder_without_files_is_built_untied_as_its_processed_source_is(
    folder: Path, models: ModelStore, log_lines: LogLines
) -> None:
    kind = "processed-untied-by-file"
    disk = harness.load(harness.engine_config(models.get(kind))).model
    _loaded, holding = offered(models.get(kind), {})
    with source_of(holding) as source:
        pulled = pull(models.bare(kind), source).model
    assert log_lines.one("output embedding of its own")
    assert digests(pulled) == digests(disk)
