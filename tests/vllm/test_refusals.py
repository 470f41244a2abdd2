"""Refusals of a load, a pull or a reload that no other test causes: the cause, and the client's log line.

docs/refusals.md lists all of them, and `tests/test_refusals.py` checks that list.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from netloader.core.identity import ModelIdentity, Severity, differences
from netloader.errors import MemoryStillInUse
from netloader.vllm.live import reloading
from netloader.vllm.live.reloading import ReloadRefused
from netloader.vllm.load import agree_ranks
from netloader.vllm.load.inspect_engine import NothingPulled
from netloader.vllm.model import post_processing
from netloader.vllm.model.agreement import Report
from netloader.vllm.serve import serving
from tests.models import ModelStore
from tests.vllm import harness
from tests.vllm.drafts import KINDS, load_pair
from tests.vllm.processors import on_each_processor
from tests.vllm.pulls import LogLines, Seeds, extra, load, pull, source_of
from tests.vllm.reloads import config_of, reload
from tests.vllm.test_fallback import REFUSALS

pytestmark = pytest.mark.usefixtures("needs_vllm")


# --- identity -------------------------------------------------------------------------------------------------------


def test_embeddings_that_are_tied_on_one_side_only(seeds: Seeds, models: ModelStore, log_lines: LogLines) -> None:
    """Both sides know it from their weight files, so the client does not take it over from the source."""
    seed = seeds.get("llama-tied")
    assert seed.holding.announcement.identity.tied is True
    with source_of(seed.holding, tied=False) as source:
        assert pull(models.get("llama-tied"), source).raw == seed.disk
    line = log_lines.one("default loader", "could not pull")
    assert "the identities differ: tied is 'False' at the server and 'True' at the client" in line


SETTING, PROCESSED_SETTING = "a.setting", "a.processed.setting"


def test_every_field_that_a_pull_compares_has_a_case_with_its_line() -> None:
    """A field that is added to the identity needs a case, here or among REFUSALS."""
    elsewhere = {
        "model": "REFUSALS, where the field is `names`: a difference of names is told as one of `model`",
        "tied": test_embeddings_that_are_tied_on_one_side_only,
        "layout": "test_fallback.test_a_checkpoint_server_is_refused_with_a_hint",
        "role": "test_pull.test_a_draft_model_that_the_source_does_not_have_is_loaded_by_default",
        "engine": "test_processed.test_another_engine_version_is_refused",
        SETTING: "test_settings.test_a_source_with_another_override_is_refused_before_a_byte_moves",
        PROCESSED_SETTING: "test_processed.test_a_setting_that_decides_processed_weights_is_refused",
        "load_state": "drivers.test_refusals.test_identities_that_differ_in_one_field: no loader states it beforehand",
    }
    tried = {field for _, identity, _ in REFUSALS.values() for field in identity} | elsewhere.keys()
    full = ModelIdentity(**{f: _value(f, 0) for f in ModelIdentity.__struct_fields__})
    refusing = set()
    for field in ModelIdentity.__struct_fields__:
        other = msgspec.structs.replace(full, **{field: _value(field, 1)})
        both = []
        if field in ("engine", "processed_settings"):
            both = [msgspec.structs.replace(each, layout="processed") for each in (full, other)]
        ours, theirs = both or (full, other)
        refusing |= {d.field for d in differences(ours, theirs) if d.severity is Severity.REFUSE}
    assert refusing - tried == set()


def _value(field: str, which: int) -> Any:
    known: dict[str, tuple[Any, Any]] = {
        "layout": ("raw", "processed"),
        "role": ("target", "draft"),
        "tied": (True, False),
        "load_state": ({"a": True}, {"a": False}),
        "names": ({"MODEL": "a"}, {"MODEL": "b"}),
        "settings": ({SETTING: "1"}, {SETTING: "2"}),
        "processed_settings": ({PROCESSED_SETTING: "1"}, {PROCESSED_SETTING: "2"}),
    }
    numbers = ("tp_size", "tp_rank", "pp_size", "pp_rank", "ep_size", "ep_rank")
    return known.get(field, (7, 8) if field in numbers else ("a", "b"))[which]


@pytest.mark.parametrize("knows", ["server", "client"])
def test_a_token_that_only_one_side_has(
    knows: str, seeds: Seeds, models: ModelStore, tmp_path: Path, log_lines: LogLines
) -> None:
    seed = seeds.get("draft")
    secret = tmp_path / "secret"
    secret.write_bytes(b"a secret of many bytes")
    secret.chmod(0o600)
    settings = {"TOKEN_FILE": str(secret)} if knows == "client" else {}
    with source_of(seed.holding, token=secret.read_bytes() if knows == "server" else None) as source:
        assert pull(models.get("draft"), source, **settings).raw == seed.disk
    who = "this server has a token, and the client has none"
    if knows == "client":
        who = "the server has no token, and this client has one"
    assert f"{who} (configure the same token on both sides" in log_lines.one("default loader", "could not pull")


def test_a_transport_that_cannot_run_here(seeds: Seeds, models: ModelStore, log_lines: LogLines) -> None:
    seed = seeds.get("draft")
    with source_of(seed.holding) as source:
        assert pull(models.get("draft"), source, TRANSPORT="hccl").raw == seed.disk
    line = log_lines.one("default loader", "could not pull")
    assert (
        "no transport can run here for tensors on cpu: hccl: it moves tensors in an NPU's memory only, not on cpu"
        in line
    )


# --- what a server does not serve -----------------------------------------------------------------------------------


@pytest.fixture
def after_weights(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], object]], None]:
    """Changes the model at the end of its own loading, as some models do while they load."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    def install(change: Callable[[Any], object]) -> None:
        original = DefaultModelLoader.load_weights

        def load_weights(self: Any, model: Any, model_config: Any) -> None:
            original(self, model, model_config)
            change(model)

        monkeypatch.setattr(DefaultModelLoader, "load_weights", load_weights)

    return install


def _notes_a_fact(model: Any) -> None:
    model.model.norm.seen_in_the_files = 7


def _keeps_a_tensor(model: Any) -> None:
    model.model.norm.table = [model.lm_head.weight.sum(dim=0)]


def _fills_a_computed_buffer(model: Any) -> None:
    model.model.layers[0].self_attn.rotary_emb.cos_sin_cache.mul_(2)


def _grows_a_parameter(model: Any) -> None:
    model.model.norm.bias = torch.nn.Parameter(torch.zeros(3), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_notes_a_fact, "loading sets more than tensors: model.norm.seen_in_the_files (load this model from storage)"),
        (_keeps_a_tensor, "loading sets more than tensors: model.norm.table[0] (load this model from storage)"),
        (_fills_a_computed_buffer, "loading sets more than tensors: model.layers.0.self_attn.rotary_emb.cos_sin_cache"),
        (_grows_a_parameter, "loading changes which tensors the model has (load this model from storage)"),
    ],
    ids=["a fact", "a tensor without a name", "a computed tensor", "a tensor"],
)
def test_a_model_that_is_more_than_its_raw_tensors_is_not_served(
    change: Callable[[Any], object],
    reason: str,
    after_weights: Callable[[Callable[[Any], object]], None],
    models: ModelStore,
    log_lines: LogLines,
) -> None:
    after_weights(change)
    load(models.get("draft"))
    assert f"rank 0 does not serve its target: {reason}" in log_lines.one("does not serve its target")
    server = serving.running_server()
    assert server is not None
    log_lines.lines.clear()
    pull(models.get("draft"), server.address)
    assert reason in log_lines.one("default loader", "could not pull"), "the client is told the same"


@on_each_processor
def test_a_draft_that_shares_tensors_is_served_raw_or_not_at_all(
    processor: str, models: ModelStore, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.model_loader import base_loader

    process = base_loader.process_weights_after_loading

    def and_rewrite(model: torch.nn.Module, *arguments: Any) -> None:
        process(model, *arguments)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("down_proj.weight"):
                    weight.copy_(weight.flip(0).contiguous())

    kind = KINDS["EAGLE"]
    with monkeypatch.context() as patch:
        patch.setattr(base_loader, "process_weights_after_loading", and_rewrite)
        # Without copies. Where vLLM packs the weight it is gone; else it is rewritten in place.
        load_pair(models.get(kind.target), kind.speculative(models.get), extra(KEEP_RAW=False))
    line = log_lines.one("does not serve its draft")
    assert "raw tensors behind: " in line
    assert "; its processed weights are not exact either: " in line
    assert "a draft that shares tensors with its target is served raw only" in line


# --- the ranks of one engine ----------------------------------------------------------------------------------------

HEX = "ab" * 16


def _beside(monkeypatch: pytest.MonkeyPatch, *others: Report) -> None:
    """Simulate a second rank that sends one of these reports per exchange, and then the last one again."""
    told = list(others)

    def exchange(mine: Report, *_: Any) -> tuple[Report, ...]:
        return mine, told.pop(0) if len(told) > 1 else told[0]

    monkeypatch.setattr(agree_ranks, "exchange", exchange)


def _second(outcome: Any, **said: Any) -> Report:
    return Report(outcome, 1, **said)


RANKS: dict[str, tuple[tuple[Report, ...], dict[str, Any], str]] = {
    "it could not pull": (
        (_second("failed", reason="its source is down"),),
        {},
        "what was pulled is not kept: rank 1 could not pull: its source is down",
    ),
    "another load": (
        (_second("pulled", root=HEX, load="cd" * 16),),
        {"load": HEX},
        (
            "what was pulled is not kept: the ranks have weights of different loads (load: rank 0 has "
            "abababababababab, rank 1 has cdcdcdcdcdcdcdcd)"
        ),
    ),
    "another checkpoint": (
        (_second("pulled", root=HEX, fingerprint="cd" * 16),),
        {"load": ""},
        "the ranks have weights of different loads (fingerprint: rank 0 has ",
    ),
    "not the whole": (
        (_second("pulled", root=HEX, load=HEX),),
        {"load": HEX},
        "the ranks did not pull what their sources hold together (load abababababababab)",
    ),
    "no proof": (
        (_second("pulled", root=HEX),),
        {"load": ""},
        "nothing shows that all ranks have weights of one model (the source of rank 0 does not say",
    ),
    "a mixture": (
        (_second("default", serves=True), _second("default", root=HEX, serves=True)),
        {"load": HEX},
        "what was pulled is not kept: rank 1 loaded other weights by default than the source's engine holds",
    ),
    "a mixture that nobody can see": (
        (_second("default", serves=True), _second("default", serves=True)),
        {"load": HEX},
        "nothing shows that what some ranks loaded by default is what the source's engine holds",
    ),
}


@pytest.mark.parametrize("case", RANKS)
def test_a_rank_whose_neighbour_reports_something_else_keeps_nothing(
    case: str, seeds: Seeds, models: ModelStore, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second rank is simulated; `test_ranks.py` has real ones."""
    reports, identity, reason = RANKS[case]
    seed = seeds.get("draft")
    with source_of(seed.holding, **identity) as source:
        _beside(monkeypatch, *reports)
        assert pull(models.get("draft"), source).raw == seed.disk
    assert reason in log_lines.one("the default loader (auto) loads the target")


def test_without_a_default_loader_one_rank_that_failed_ends_all(
    seeds: Seeds, models: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = (
        "rank 0 has no weights for its target, and FALLBACK is false: what was pulled is not kept: rank 1 could not"
    )
    with source_of(seeds.get("draft").holding) as source:
        _beside(monkeypatch, _second("failed", reason="its source is down"))
        with pytest.raises(NothingPulled, match=reason):
            pull(models.get("draft"), source, FALLBACK=False)


# --- reloading a live engine ----------------------------------------------------------------------------------------


@pytest.fixture
def live(seeds: Seeds, models: ModelStore) -> Callable[[str], torch.nn.Module]:
    """A model that was pulled and serves, as an engine's would."""

    def make(kind: str) -> torch.nn.Module:
        with source_of(seeds.get(kind).holding) as source:
            return load(models.bare(kind), source).model

    return make


def _refused(model: torch.nn.Module, config: Any, log_lines: LogLines) -> str:
    """Reload, and check that it is refused and that the model is unchanged. Returns the log line with the reason."""
    before = harness.raw_digests(model)
    log_lines.lines.clear()
    with pytest.raises(ReloadRefused) as caught:
        reload(model, config)
    assert harness.raw_digests(model) == before
    line = log_lines.one("rank 0: the weights stay as they are: ")
    assert line.removeprefix("netloader: ") in str(caught.value)
    return line


def test_a_reload_from_a_source_with_another_model(
    seeds: Seeds, models: ModelStore, live: Callable[[str], torch.nn.Module], log_lines: LogLines
) -> None:
    model = live("llama-bf16")
    with source_of(seeds.get("llama-bf16").holding, names={"MODEL": "another"}) as source:
        line = _refused(model, config_of(models, "llama-bf16", source), log_lines)
    assert "the identities differ: model is 'another' at the server" in line


def test_a_reload_from_a_source_with_other_weights(
    seeds: Seeds, models: ModelStore, live: Callable[[str], torch.nn.Module], log_lines: LogLines
) -> None:
    model = live("llama-bf16")
    root = seeds.get("llama-bf16").holding.announcement.root
    with source_of(seeds.get("llama-bf16-other").holding, fingerprint="") as source:
        line = _refused(model, config_of(models, "llama-bf16", source), log_lines)
    assert f"the client is pinned to root {root}" in line


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("llama-tied", {}, "the model has tied weights, which vLLM's reload takes apart"),
        (
            "llama-w8a8",
            {"INT8_CACHE": "dram"},
            "vLLM's own reload does not put back exactly what a first load does for model.layers.0.self_attn.qkv_proj",
        ),
    ],
    ids=["tied", "quantised"],
)
def test_a_reload_that_would_not_be_exact(
    kind: str, settings: dict[str, Any], reason: str, seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    with source_of(seeds.get(kind, **settings).holding) as source:
        model = load(models.bare(kind), source, **settings).model
        assert reason in _refused(model, config_of(models, kind, source, **settings), log_lines)


def test_a_reload_of_a_model_that_this_loader_did_not_load(
    seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    model = harness.load(harness.engine_config(models.get("llama-bf16"))).model
    with source_of(seeds.get("llama-bf16").holding) as source:
        line = _refused(model, config_of(models, "llama-bf16", source), log_lines)
    assert "it is not known what this model's raw tensors were" in line


def test_a_reload_beside_a_path(
    seeds: Seeds, models: ModelStore, live: Callable[[str], torch.nn.Module], log_lines: LogLines
) -> None:
    model = live("llama-bf16")
    with source_of(seeds.get("llama-bf16").holding) as source:
        config = config_of(models, "llama-bf16", source)
        config.model_config.model = "/models/another"
        line = _refused(model, config, log_lines)
    assert "a path was given (/models/another), and a SOURCE is configured" in line


def test_a_reload_for_which_there_is_no_memory(
    seeds: Seeds,
    models: ModelStore,
    live: Callable[[str], torch.nn.Module],
    log_lines: LogLines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(_: Any) -> Any:
        raise MemoryError("cannot allocate 16 GB")

    model = live("llama-bf16")
    monkeypatch.setattr(reloading, "_staging", full)
    with source_of(seeds.get("llama-bf16").holding) as source:
        line = _refused(model, config_of(models, "llama-bf16", source), log_lines)
    assert "no memory for the new weights beside the old ones: cannot allocate 16 GB" in line


def test_a_reload_whose_new_memory_a_thread_may_still_write(
    models: ModelStore, live: Callable[[str], torch.nn.Module], log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is kept, because the thread might overwrite what is put there next."""
    lent: list[dict[str, torch.Tensor]] = []

    def pull(staging: dict[str, torch.Tensor], *_: Any) -> Any:
        lent.append(staging)
        raise MemoryStillInUse("tcp channel", [threading.current_thread()], writes=True, seconds=10)

    model = live("llama-bf16")
    monkeypatch.setattr(reloading, "pull_raw", pull)
    line = _refused(model, config_of(models, "llama-bf16", "127.0.0.1:9"), log_lines)
    assert "may still write into the memory that is being filled" in line
    assert any(kept is lent[0] for kept in vars(model)["_netloader_in_use"])


def test_a_reload_where_only_some_ranks_have_a_source(
    seeds: Seeds,
    models: ModelStore,
    live: Callable[[str], torch.nn.Module],
    log_lines: LogLines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second rank is simulated."""
    known = "ab" * 16
    monkeypatch.setattr(
        reloading, "exchange", lambda mine, *_: (msgspec.structs.replace(mine, fingerprint=known), _second("default"))
    )
    monkeypatch.setattr(reloading, "disagreement", lambda _: "")
    model = live("llama-bf16")
    with source_of(seeds.get("llama-bf16").holding) as source:
        line = _refused(model, config_of(models, "llama-bf16", source), log_lines)
    assert "some ranks have a SOURCE and some have none" in line


def test_a_reload_by_a_loader_that_cannot(models: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(models.get("llama-bf16")).model
    before = harness.raw_digests(model)
    monkeypatch.setattr(reloading, "fallback_loader", lambda *_: SimpleNamespace())
    config = harness.engine_config(models.get("llama-bf16"), load_format="netloader", extra=extra())
    reason = "rank 0 has no SOURCE to reload from, and the loader for 'auto' cannot reload"
    with pytest.raises(ReloadRefused, match=reason):
        reload(model, config)
    assert harness.raw_digests(model) == before


# --- processed weights ----------------------------------------------------------------------------------------------


def test_an_engine_that_does_not_know_processed_weights_serves_none(
    models: ModelStore, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(post_processing, "possible", lambda: False)
    load(models.get("llama-w8a8"))
    line = log_lines.one("does not serve its target")
    assert "its processed weights are not exact either: this vLLM does not know processed weights" in line
