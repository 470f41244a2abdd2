"""Originals of weights that vLLM rewrites: which are kept, where, how much memory they take, and what is logged."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from netloader import sync
from netloader.errors import NoSourceLeft
from netloader.vllm.model import copies
from netloader.vllm.serve import serving
from netloader.vllm.serve.raw_holding import RawHolding
from tests.models import ModelStore
from tests.vllm.processors import WITHOUT, on_each_processor
from tests.vllm.pulls import LogLines, Seeds, load, pull
from tests.vllm.releases import KNOWS_PROCESSED

pytestmark = pytest.mark.usefixtures("needs_vllm")

EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture
def rewritten(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Post-processing that also reverses the rows of the embeddings in place. Yields the tensor's name."""
    from vllm.model_executor.model_loader import base_loader

    process = base_loader.process_weights_after_loading

    def and_rewrite(model: torch.nn.Module, *arguments: object) -> None:
        process(model, *arguments)
        with torch.no_grad():
            weight = model.get_parameter(EMBEDDINGS)
            weight.copy_(weight.flip(0).contiguous())

    with monkeypatch.context() as patch:
        patch.setattr(base_loader, "process_weights_after_loading", and_rewrite)
        yield EMBEDDINGS


def _served() -> RawHolding:
    server = serving.running_server()
    assert server is not None
    (holding,) = server._server.holdings.held()
    assert isinstance(holding, RawHolding)
    return holding


@pytest.mark.parametrize("setting", ["dram", "hbm"])
def test_what_copies_cost_is_logged_in_bytes(setting: str, models: ModelStore, log_lines: LogLines) -> None:
    load(models.get("llama-w8a8"), INT8_CACHE=setting)
    made = re.search(r"(\d+) tensors copied, (\d+) bytes on cpu", log_lines.one(f"INT8_CACHE={setting}: ", "copied"))
    kept = re.search(rf"INT8_CACHE={setting}: (\d+) bytes on cpu", log_lines.one("serves target", "originals kept"))
    assert made is not None
    assert kept is not None
    located = _served().located
    mine = {id(t): t.nbytes for n, t in located.kept.items() if located.reasons[n].name.lower() == setting}
    assert int(kept[1]) == sum(mine.values()) > 1_000_000
    assert int(made[2]) >= int(kept[1]), "copies of what vLLM left alone were freed"
    assert not log_lines.with_part("the device is full")


def test_copies_for_a_full_device_go_to_the_host_with_a_warning(
    seeds: Seeds, models: ModelStore, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copies._copy

    def full(tensor: torch.Tensor, *, host: bool) -> torch.Tensor:
        if not host and tensor.nbytes > 4096:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 1 GiB")
        return copy(tensor, host=host)

    monkeypatch.setattr(copies, "_copy", full)
    loaded = load(
        models.get("llama-w8a8"), INT8_CACHE="hbm"
    )  # kept alive, because unchanged tensors are served from it
    assert log_lines.one("INT8_CACHE=hbm: the device is full, the copies go to the host's memory (out of memory.")
    server = serving.running_server()
    assert server is not None
    assert pull(models.bare("llama-w8a8"), server.address).raw == seeds.disk("llama-w8a8") == loaded.raw


@on_each_processor
def test_a_rewrite_in_place_is_refused_by_name(
    processor: str, rewritten: str, models: ModelStore, log_lines: LogLines
) -> None:
    loaded = load(models.get("llama-bf16"))  # kept alive, because processed weights may be served from it
    # Small tensors share a block, and a digest tells no more than which block it is.
    reason = f"raw tensors behind: {rewritten} (vLLM rewrote it in place, or a tensor of the same block)"
    line = log_lines.one(reason)
    # Where vLLM packs weights nothing is served; elsewhere the processed weights are, if this vLLM has such.
    assert ("no raw layout" if processor == WITHOUT and KNOWS_PROCESSED else "does not serve its target") in line
    assert "list these names in INT8_CACHE_NAME" in line
    server = serving.running_server()
    assert server is not None
    with pytest.raises(NoSourceLeft, match=re.escape(reason)):
        sync.pull_new(sources=[server.address], layouts=("raw",))
    del loaded


def test_a_copy_keeps_the_values_after_a_rewrite_in_place(
    rewritten: str, seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    loaded = load(models.get("llama-bf16"), INT8_CACHE="dram", INT8_CACHE_NAME=[rewritten])
    assert "INT8_CACHE=dram: " in log_lines.one("serves target", "originals kept")
    server = serving.running_server()
    assert server is not None
    assert pull(models.bare("llama-bf16"), server.address).raw == seeds.disk("llama-bf16") == loaded.raw


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Post-processing that also transposes the embeddings, as that of other devices does with weights.

    Yields the tensor's name. The model can't run then.
    """
    from vllm.model_executor.model_loader import base_loader

    process = base_loader.process_weights_after_loading

    def and_turn(model: torch.nn.Module, *arguments: object) -> None:
        process(model, *arguments)
        weight = model.get_parameter(EMBEDDINGS)
        weight.data = weight.data.t().contiguous()

    with monkeypatch.context() as patch:
        patch.setattr(base_loader, "process_weights_after_loading", and_turn)
        yield EMBEDDINGS


def test_what_is_only_transposed_is_computed_and_no_original_is_kept(
    turned: str, seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    loaded = load(models.get("llama-bf16"))
    assert "1 tensor computed from processed ones" in log_lines.one("serves target")
    located = _served().located
    assert located.inverses[turned].steps == ("transpose",)
    assert turned not in located.kept
    server = serving.running_server()
    assert server is not None
    assert pull(models.bare("llama-bf16"), server.address).raw == seeds.disk("llama-bf16") == loaded.raw
    scratch = _served().memory.scratch
    assert scratch.owned == 0, "what was computed was freed with the views"
