"""If nothing can be pulled: exactly the default loader's model, and one log line with the reason."""

from __future__ import annotations

import atexit
import logging
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import netloader.tensors
from netloader import sync
from netloader.errors import ConfigError, MemoryStillInUse, NetloaderError, PeerLost
from netloader.server import catalog
from netloader.transports.base import BlockView
from netloader.transports.faults import Fault
from netloader.transports.io import thread_pool, worker
from netloader.vllm.load import examine_model, inspect_engine, pull_weights
from netloader.vllm.load.inspect_engine import NothingPulled
from netloader.vllm.model.processed import survey
from netloader.vllm.model.snapshot import named_raw_tensors
from netloader.vllm.serve import serving
from tests.models import ModelStore
from tests.vllm import harness
from tests.vllm.processors import WITHOUT, on_each_processor
from tests.vllm.pulls import LogLines, Seeds, extra, load, pull, source_of
from tests.vllm.releases import PACKS_EXPERTS, needs_head_search

pytestmark = pytest.mark.usefixtures("needs_vllm")


def closed_address() -> str:
    """An address where nothing listens. A socket that does not listen keeps the port."""
    holder = socket.socket()
    holder.bind(("127.0.0.1", 0))
    atexit.register(holder.close)
    return f"127.0.0.1:{holder.getsockname()[1]}"


# --- exactly the default loader's model -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-bf16", "llama-w8a8", "qwen3-moe"])
def test_after_a_pull_that_wrote_garbage_everywhere_the_fallback_is_a_clean_load(
    kind: str, seeds: Seeds, models: ModelStore, monkeypatch: pytest.MonkeyPatch, log_lines: LogLines
) -> None:
    def dirty(tensors: dict[str, torch.Tensor], *_: Any) -> None:
        for tensor in tensors.values():
            memory = torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage())
            memory.fill_(0x5A)
        raise PeerLost("the source died")

    monkeypatch.setattr(pull_weights, "pull_raw", dirty)
    assert pull(models.get(kind), closed_address()).raw == seeds.disk(kind)
    assert "could not pull: the source died" in log_lines.one("default loader", "could not pull")


@pytest.mark.parametrize(
    "fault", ["cut:1:100", "corrupt:0:5000", "corrupt:1:77"], ids=["cut", "corrupt first", "corrupt last"]
)
def test_after_a_source_that_breaks_the_fallback_is_a_clean_load(
    fault: str, seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    seed = seeds.get("llama-bf16")
    kind, block, byte = fault.split(":")
    broken = Fault.parse(fault)
    again = [Fault(broken.kind, int(block), byte=int(byte), times=None)]
    with source_of(seed.holding, *again) as source:
        assert pull(models.get("llama-bf16"), source).raw == seed.disk
    line = log_lines.one("default loader", "could not pull")
    assert (f"block {block} (" in line and "arrived with digest" in line) if kind == "corrupt" else "verified" in line


def test_a_second_source_takes_over_from_one_that_breaks(seeds: Seeds, models: ModelStore, log_lines: LogLines) -> None:
    seed = seeds.get("llama-bf16")
    log_lines.lines.clear()  # the seed's own load
    with source_of(seed.holding, Fault.parse("corrupt:1:9")) as broken, source_of(seed.holding) as whole:
        # One source at a time, because the other one could otherwise send all blocks before the broken one does.
        assert pull(models.bare("llama-bf16"), closed_address(), broken, whole, STRIPE=1).raw == seed.disk
    assert log_lines.with_part("source 127.0.0.1:", "arrived with digest")
    assert not log_lines.with_part("default loader")


# --- the reason -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "SOURCE omitted"),
        ({"SOURCE": []}, "SOURCE is empty"),
        ({"SOURCE": [{"device_id": 3, "sources": ["h:1024"]}]}, "SOURCE has no entry for rank 0; it has 3"),
        ({"SOURCE": [{"device_id": 0, "sources": []}]}, "SOURCE lists no address for rank 0"),
    ],
)
def test_without_a_source_one_line_says_so(
    settings: dict[str, Any], reason: str, seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    assert load(models.get("draft"), SERVE=False, **settings).raw == seeds.disk("draft")
    assert log_lines.one("default loader").endswith(f"rank 0: the default loader (auto) loads the target: {reason}")


REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another model": ("llama-bf16", {"names": {"MODEL": "other"}}, "set MODEL to one name on both sides"),
    "another dtype": ("llama-bf16", {"dtype": "float16"}, "dtype is 'float16' at the server and 'bfloat16'"),
    "another TP size": ("llama-bf16", {"tp_size": 2}, "tp_size is '2' at the server and '1' at the client"),
    "another rank": ("llama-bf16", {"tp_size": 2, "tp_rank": 1}, "tp_rank is '1' at the server"),
    "another quantisation": ("llama-bf16", {"quantization": "awq"}, "quantization is 'awq'"),
    "another architecture": ("llama-bf16", {"architecture": "X"}, "architecture is 'X'"),
    "another revision": ("llama-bf16", {"revision": "r2"}, "revision is 'r2' at the server and 'r1' at the client"),
    "another quantisation config": (
        "llama-bf16",
        {"quantization_config": "f0"},
        "quantization_config is 'f0' at the server and '' at the client",
    ),
    "another PP size": ("llama-bf16", {"pp_size": 2}, "pp_size is '2' at the server and '1' at the client"),
    "another PP rank": ("llama-bf16", {"pp_size": 2, "pp_rank": 1}, "pp_rank is '1' at the server and '0'"),
    "another EP size": ("qwen3-moe", {"ep_size": 4}, "ep_size is '4' at the server and '1' at the client"),
    "another EP rank": ("qwen3-moe", {"ep_size": 4, "ep_rank": 3}, "ep_rank is '3' at the server and '0'"),
    "another placement": (
        "qwen3-moe",
        {"expert_placement": "round_robin"},
        "expert_placement is 'round_robin' at the server and '' at the client",
    ),
    "another fine-tune": (
        "llama-bf16",
        {"fingerprint": "f0" * 16},
        f"fingerprint is '{'f0' * 16}' at the server",
    ),
}
ARGUMENTS: dict[str, dict[str, Any]] = {"another revision": {"revision": "r1"}}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_source_with_another_model_is_refused_by_name(
    case: str, seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    kind, identity, reason = REFUSALS[case]
    seed = seeds.get(kind)
    with source_of(seed.holding, **identity) as source:
        assert load(models.get(kind), source, SERVE=False, arguments=ARGUMENTS.get(case)).raw == seed.disk
    assert reason in log_lines.one("default loader", "could not pull")
    assert not log_lines.with_part("TRANSFER"), "before the first byte"


# The name of a late tensor of each kind of model; all headers stay the same.
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama-bf16", "model.layers.3.mlp.down_proj.weight"),
        ("llama-bf16", "lm_head.weight"),
        ("qwen3-moe", "model.layers.1.mlp.experts.7.up_proj.weight"),
    ],
)
def test_a_fine_tune_of_the_same_model_is_refused_by_name(
    kind: str, name: str, seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    changed = seeds.changed(kind, name)
    usual = seeds.get(kind)
    theirs = changed.holding.announcement.identity.fingerprint
    ours = usual.holding.announcement.identity.fingerprint
    assert (len(theirs), len(ours)) == (32, 32)
    with source_of(changed.holding) as source:
        assert pull(models.get(kind), source).raw == usual.disk
        line = log_lines.one("default loader", "could not pull")
        assert f"fingerprint is {theirs!r} at the server and {ours!r} at the client" in line
        # Without files to compare with, the source's fingerprint is used, and logged at debug level.
        log_lines.setLevel(logging.DEBUG)
        assert pull(models.bare(kind), source).raw == changed.loaded.raw
    assert log_lines.one("checkpoint fingerprint").endswith(theirs)


@pytest.mark.parametrize("field", ["load", "fingerprint"])
def test_a_source_whose_digests_are_not_digests_is_refused(
    field: str, seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    seed = seeds.get("llama-bf16")
    files = models.get("llama-bf16") if field == "load" else models.bare("llama-bf16")
    said: dict[str, Any] = {field: "not a digest"}
    with source_of(seed.holding, **said) as source:
        if field == "load":
            assert pull(files, source).raw == seed.disk
        else:
            with pytest.raises(RuntimeError, match="Cannot find any model weights"):
                pull(files, source)
    assert f"the source's {field} is no digest: 'not a digest'" in log_lines.one("the default loader (auto) loads")


@pytest.mark.parametrize("field", ["load", "model", "engine"])
def test_a_source_whose_texts_are_too_long_is_left_out(
    field: str, seeds: Seeds, models: ModelStore, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "check_sendable", lambda identity: None)  # our own servers refuse to say such a text
    seed = seeds.get("llama-bf16")
    said: dict[str, Any] = {field: "f" * 5000}
    with source_of(seed.holding, **said) as long, source_of(seed.holding) as source:
        assert pull(models.bare("llama-bf16"), long, source).raw == seed.disk
    assert log_lines.with_part("source 127.0.0.1:", f"$.identity.{field}")


def test_the_type_that_only_weight_files_tell_is_a_refusal_without_them(
    seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    """Without dtype in config.json vLLM looks into the files; a folder without them gets another type."""
    seed = seeds.get("llama-no-dtype")
    assert seed.holding.announcement.identity.dtype == "float16"
    with (
        source_of(seed.holding) as source,
        pytest.raises(RuntimeError, match="Cannot find any model weights"),
    ):
        pull(models.bare("llama-no-dtype"), source)
    line = log_lines.one("the default loader (auto) loads", "could not pull")
    assert "dtype is 'float16' at the server and" in line
    assert "give both sides the same --dtype" in line
    with source_of(seed.holding) as source:
        told = load(models.bare("llama-no-dtype"), source, SERVE=False, arguments={"dtype": "float16"})
    assert told.raw == seed.disk


def test_a_model_of_another_shape_is_refused_before_the_first_byte(
    seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    # A source that has neither weight files nor a configuration file to compare.
    with source_of(seeds.get("llama-bf16").holding, fingerprint="", settings={}) as source:
        assert pull(models.get("draft"), source).raw == seeds.disk("draft")
    assert log_lines.one("default loader", "tensors differ from what the server holds")
    assert not log_lines.with_part("TRANSFER")


def test_a_checkpoint_server_is_refused_with_a_hint(seeds: Seeds, models: ModelStore, log_lines: LogLines) -> None:
    seed = seeds.get("llama-bf16")
    with source_of(seed.holding, layout="checkpoint") as source:
        assert pull(models.get("llama-bf16"), source).raw == seed.disk
    hint = "a checkpoint server feeds `netloader pull`; an engine needs a source that is an engine"
    assert hint in log_lines.one("default loader", "could not pull")


def test_only_the_expected_root_is_accepted(seeds: Seeds, models: ModelStore, log_lines: LogLines) -> None:
    wanted, other = seeds.get("llama-bf16"), seeds.get("llama-bf16-other")
    root = wanted.holding.announcement.root
    with source_of(other.holding) as wrong, source_of(wanted.holding) as right:
        assert pull(models.bare("llama-bf16"), wrong, right, EXPECT_ROOT=root).raw == wanted.disk
        assert log_lines.with_part("source 127.0.0.1:", f"the client is pinned to root {root}")
    with source_of(other.holding, fingerprint="") as wrong:
        assert pull(models.get("llama-bf16"), wrong, EXPECT_ROOT=root).raw == wanted.disk
    assert log_lines.one("default loader", "could not pull", root)


def test_a_source_with_a_token_needs_the_same_token(
    seeds: Seeds, models: ModelStore, tmp_path: Path, log_lines: LogLines
) -> None:
    seed = seeds.get("llama-bf16")
    secret = tmp_path / "secret"
    secret.write_bytes(b"a secret of many bytes")
    secret.chmod(0o600)
    with source_of(seed.holding, token=secret.read_bytes()) as source:
        assert pull(models.get("llama-bf16"), source).raw == seed.disk
        assert log_lines.one("default loader", "could not pull", "token")
        log_lines.lines.clear()
        assert pull(models.bare("llama-bf16"), source, TOKEN_FILE=str(secret)).raw == seed.disk
    assert not log_lines.with_part("default loader")


# --- what a server does not serve -----------------------------------------------------------------------------------


def test_rewritten_weights_that_were_not_kept_are_not_served(
    seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    load(models.get("llama-w8a8"))
    server = serving.running_server()
    assert server is not None
    line = log_lines.one("does not serve its target")
    assert "qkv_proj.weight" in line
    assert "set INT8_CACHE to dram or hbm on the server" in line
    assert pull(models.get("llama-w8a8"), server.address).raw == seeds.disk("llama-w8a8")
    assert "set INT8_CACHE to dram or hbm on the server" in log_lines.one("default loader", "could not pull")


def test_a_name_that_int8_cache_leaves_out_is_named(models: ModelStore, log_lines: LogLines) -> None:
    load(models.get("llama-w8a8"), INT8_CACHE="dram", INT8_CACHE_NAME=["model.layers.0.mlp.down_proj.weight"])
    assert "add these names to INT8_CACHE_NAME" in log_lines.one("does not serve its target")


@on_each_processor
@pytest.mark.parametrize("kind", ["llama-bf16", "qwen3-moe"])
def test_without_keep_raw_a_model_is_served_only_if_all_of_it_is_still_there(
    processor: str, kind: str, models: ModelStore, log_lines: LogLines
) -> None:
    loaded = load(models.get(kind), KEEP_RAW=False)
    left = harness.raw_digests(loaded.model)
    packed = processor != WITHOUT or (kind == "qwen3-moe" and PACKS_EXPERTS)
    assert all(left.get(name) == digest for name, digest in loaded.raw.items()) is not packed
    if packed and processor == WITHOUT and log_lines.with_part("processed layout"):
        # Where vLLM has a contract for processed weights, these experts are served as they are now.
        assert "raw tensors behind" in log_lines.one("target: no raw layout")
        server = serving.running_server()
        assert server is not None
        pulled = pull(models.get(kind), server.address, FALLBACK=False)
        assert log_lines.one("target: pulled ")
        assert processed_digests(pulled.model) == processed_digests(loaded.model)
    elif packed:  # the line names the first few tensors only
        assert "set KEEP_RAW to true on the server" in log_lines.one("does not serve its target", "raw tensors")
    else:
        assert log_lines.one("serves target at", "raw layout")


def processed_digests(model: torch.nn.Module) -> dict[str, str]:
    """Of all tensors and plain values of a post-processed model."""
    return {name: harness.tensor_digest(tensor) for name, tensor in survey(model, {}).tensors.items()}


class _StuckLoader:
    """A default loader that must not get to run."""

    def load_weights(self, *_: object) -> None:
        raise AssertionError("the default loader filled memory that a thread may still write")


def test_where_a_thread_may_still_write_the_load_fails_instead_of_falling_back(
    seeds: Seeds, models: ModelStore, monkeypatch: pytest.MonkeyPatch, log_lines: LogLines
) -> None:
    """The thread is a real one. It hangs while it hashes a block, and does not react to a cancellation."""
    seed, go, stuck, asked = seeds.get("llama-bf16"), threading.Event(), set[threading.Thread](), list[str]()
    digest_of, probe = netloader.tensors.digest_of, sync.probe

    def hangs(view: BlockView, algorithm: str) -> bytes:
        stuck.add(threading.current_thread())
        assert go.wait(60)
        return digest_of(view, algorithm)

    def asks(*arguments: Any, **options: Any) -> Any:
        asked.extend(options["layouts"])
        return probe(*arguments, **options)

    for module, name in ((thread_pool, "_PATIENCE"), (thread_pool, "_MOMENT"), (worker, "_AGAIN")):
        monkeypatch.setattr(module, name, 0.1)
    monkeypatch.setattr(inspect_engine, "fallback_loader", lambda *_: _StuckLoader())
    monkeypatch.setattr(sync, "probe", asks)
    log_lines.lines.clear()  # the seed's own load
    try:
        with sync.serve(None, host="127.0.0.1", transport="tcp") as server:
            server._portal.call(server._server.add, seed.holding)
            monkeypatch.setattr(netloader.tensors, "digest_of", hangs)
            with pytest.raises(MemoryStillInUse, match="may still write into the memory that is being filled"):
                pull(models.get("llama-bf16"), server.address, TRANSPORT="tcp", TIMEOUT=3)
    finally:
        go.set()
        for thread in stuck:
            thread.join(60)
    assert stuck
    assert asked == []  # nor processed weights
    assert "tcp channel: thread netloader-tcp-recv-" in log_lines.one("nothing else may fill this memory: ")
    assert log_lines.with_part("default loader") == []


# --- no fallback ----------------------------------------------------------------------------------------------------


def test_without_fallback_a_failed_pull_ends_the_load(models: ModelStore) -> None:
    source = closed_address()
    with pytest.raises(NothingPulled, match=f"FALLBACK is false: could not pull: .*{source}: cannot be reached"):
        pull(models.get("draft"), source, FALLBACK=False)


def test_without_fallback_and_without_a_source_nothing_is_built(models: ModelStore, monkeypatch: Any) -> None:
    from vllm.model_executor.model_loader import base_loader

    monkeypatch.setattr(base_loader, "initialize_model", _never)
    with pytest.raises(NothingPulled, match="SOURCE omitted"):
        load(models.get("draft"), FALLBACK=False)


def _never(*_: object, **__: object) -> None:
    raise AssertionError("the model was built")


def test_a_folder_without_weights_and_nothing_to_pull_names_both_reasons(
    models: ModelStore, log_lines: LogLines
) -> None:
    with pytest.raises(RuntimeError, match="Cannot find any model weights") as caught:
        pull(models.bare("draft"), closed_address())
    line = log_lines.one("the default loader failed too")
    assert "Cannot find any model weights" in line
    assert "cannot be reached" in line
    assert line in caught.value.__notes__


@needs_head_search
def test_a_folder_without_weights_never_becomes_another_model(models: ModelStore, seeds: Seeds) -> None:
    """The client builds tied embeddings, because it has no weight file that unties them, and pulls nothing."""
    seed = seeds.get("llama-untied-by-file")
    with (
        source_of(seed.holding, tied=None) as source,
        pytest.raises(RuntimeError, match="Cannot find any model weights"),
    ):
        pull(models.bare("llama-untied-by-file"), source)


def test_the_format_that_takes_over_can_be_chosen(seeds: Seeds, models: ModelStore, log_lines: LogLines) -> None:
    settings = {
        "FALLBACK_FORMAT": "safetensors",
        "FALLBACK_CONFIG": {"enable_multithread_load": True, "num_threads": 2},
    }
    assert pull(models.get("llama-bf16"), closed_address(), **settings).raw == seeds.disk("llama-bf16")
    assert log_lines.one("the default loader (safetensors)")


# --- the configuration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"SOURCE": [{"device_id": 0, "sources": ["nowhere"]}]}, r"SOURCE\[0\].sources\[0\]"),
        ({"SOURCES": []}, "SOURCES"),
        ({"TRANSPORT": "pigeon"}, "TRANSPORT"),
        ({"FALLBACK_FORMAT": "nonsense"}, "FALLBACK_FORMAT"),
        ({"FALLBACK_CONFIG": {"no_such_key": 1}}, "FALLBACK_FORMAT"),
        ({"FALLBACK_FORMAT": "ipc_cache"}, "FALLBACK_FORMAT"),
    ],
)
def test_a_wrong_value_ends_the_load_before_the_model_is_built(
    settings: dict[str, Any], field: str, models: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.model_loader import base_loader

    monkeypatch.setattr(base_loader, "initialize_model", _never)
    with pytest.raises(ConfigError, match=rf"{field}.* is not valid.*; allowed: "):
        load(models.get("draft"), **settings)


def test_what_the_file_overrides_and_what_has_no_effect_is_logged(
    models: ModelStore, tmp_path: Path, log_lines: LogLines
) -> None:
    file = tmp_path / "netloader.json"
    file.write_text('{"MODEL": "from-file", "SERVE": true}', encoding="utf-8")
    load(models.get("draft"), CONFIG_FILE=str(file), MODEL="inline", INT8_CACHE_NAME=["a"])
    assert log_lines.one("MODEL: 'from-file' from CONFIG_FILE is used instead of 'inline'")
    assert log_lines.one("INT8_CACHE_NAME has no effect")
    server = serving.running_server()
    assert server is not None
    assert sync.probe(server.address).announcement.identity.model == "from-file"


def test_a_port_out_of_range_only_disables_the_server(seeds: Seeds, models: ModelStore, log_lines: LogLines) -> None:
    assert load(models.get("draft"), LISTEN_PORT=1023).raw == seeds.disk("draft")
    assert serving.running_server() is None
    assert "opens no listener" in log_lines.one("LISTEN_PORT + RANK = 1023 + 0 = 1023 is outside 1024-65535")


def test_a_port_that_is_taken_only_disables_the_server(seeds: Seeds, models: ModelStore, log_lines: LogLines) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert load(models.get("draft"), LISTEN_PORT=str(port), LISTEN_HOST="0.0.0.0").raw == seeds.disk("draft")
    assert serving.running_server() is None
    assert "Address already in use" in log_lines.one("serves nobody")


def test_clients_that_come_while_the_model_is_loading_are_told_to_wait(
    seeds: Seeds, models: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[NetloaderError] = []
    original = named_raw_tensors

    def look(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        server = serving.running_server()
        if server is not None and not seen:
            with pytest.raises(NetloaderError) as caught:
                sync.probe(server.address, layouts=("raw",))
            seen.append(caught.value)
        return original(model)

    monkeypatch.setattr(examine_model, "named_raw_tensors", look)
    load(models.get("draft"))
    assert getattr(seen[0], "code", "") == "not-ready"
    assert "still being loaded" in str(seen[0])


def test_a_load_that_fails_tells_clients_that_wait(models: ModelStore) -> None:
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        load(models.bare("draft"))
    server = serving.running_server()
    assert server is not None
    with pytest.raises(NetloaderError, match="could not be loaded"):
        sync.probe(server.address, layouts=("raw",))


def test_building_a_loader_does_nothing_but_read_the_configuration(models: ModelStore, log_lines: LogLines) -> None:
    from vllm.model_executor.model_loader import get_model_loader

    config = harness.engine_config(models.get("draft"), load_format="netloader", extra=extra([closed_address()]))
    for _ in range(3):
        get_model_loader(config.load_config)
    assert serving.running_server() is None
    assert log_lines.lines == []
    get_model_loader(config.load_config).download_model(config.model_config)
    assert log_lines.one("nothing is downloaded ahead")


def test_weights_can_be_loaded_into_a_model_that_is_there_already(
    seeds: Seeds, models: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import base_loader, get_model_loader

    seed = seeds.get("llama-fp16")
    config = harness.engine_config(models.bare("llama-fp16"), load_format="dummy")
    with monkeypatch.context() as patch:  # it may pack raw weights, which leaves nothing to fill
        patch.setattr(base_loader, "process_weights_after_loading", lambda *_: None)
        model = harness.load(config).model
    with source_of(seed.holding) as source:
        changed = harness.engine_config(
            models.bare("llama-fp16"), load_format="netloader", extra=extra([source], SERVE=False)
        )
        with set_current_vllm_config(changed):
            get_model_loader(changed.load_config).load_weights(model, changed.model_config)
    assert harness.raw_digests(model) == seed.disk
