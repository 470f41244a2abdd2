"""The newest supported release has no CPU build yet, so its `replace_parameter` runs inside the release that has one.

Its text comes from the release itself (`tests/wheels.py`) and takes the place of this vLLM's function everywhere.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from netloader.vllm.model import overwritten
from netloader.vllm.model.overwritten import overwritten_modules
from netloader.vllm.serve import recording, serving
from tests.contract.names import NEWEST
from tests.contract.sources import Sources
from tests.models import ModelStore
from tests.vllm import harness
from tests.vllm.pulls import LogLines, Seeds, load, pull
from tests.wheels import sources_of

pytestmark = pytest.mark.usefixtures("needs_vllm")

MOE = "qwen3-moe"
UTILS = "vllm.model_executor.utils"
EXPERTS = ("w13_weight", "w2_weight")


@dataclass
class Newest:
    """The newest release's `replace_parameter`.

    Attributes:
        overwrote: Names of the parameters whose memory it wrote other values to.
    """

    function: Any
    overwrote: list[str] = field(default_factory=list)

    def __call__(self, layer: Any, name: str, new: torch.Tensor | None, prefer_copy: bool = False) -> None:
        del prefer_copy  # the newest release has no such parameter
        before = getattr(layer, name, None)
        held = before.detach() if isinstance(before, torch.Tensor) else None
        values = None if held is None else held.clone()
        self.function(layer, name, new)
        trial = type(layer) is torch.nn.Module  # the adapter's own
        if held is not None and values is not None and not torch.equal(held, values) and not trial:
            self.overwrote.append(name)


@pytest.fixture
def newest(seeds: Seeds, monkeypatch: pytest.MonkeyPatch) -> Iterator[Newest]:
    """The newest release's `replace_parameter` in the place of this vLLM's."""
    seeds.get(MOE)  # from here on no module imports the function for the first time
    utils = sys.modules[UTILS]
    found = Sources(sources_of("vllm", NEWEST)).find(UTILS, "replace_parameter")
    assert found is not None
    names: dict[str, Any] = {"torch": torch, "set_weight_attrs": vars(utils)["set_weight_attrs"]}
    exec(compile(ast.Module([found[1]], []), f"vLLM {NEWEST}", "exec"), names)
    made, ours = Newest(names["replace_parameter"]), vars(utils)["replace_parameter"]
    with monkeypatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("vllm.") and vars(module).get("replace_parameter") is ours:
                patch.setattr(module, "replace_parameter", made)
        yield made


def served_address() -> str:
    server = serving.running_server()
    assert server is not None
    return server.address


def test_this_vllm_and_the_newest_are_told_apart(seeds: Seeds, request: pytest.FixtureRequest) -> None:
    assert not overwritten._copies_in_place()
    model = seeds.get(MOE).loaded.model
    assert overwritten_modules(model) == frozenset(), "this vLLM replaces tensors, so that no copy is needed"
    request.getfixturevalue("newest")
    assert overwritten._copies_in_place()
    owners = {name.rpartition(".")[0] for name in seeds.disk(MOE) if name.endswith(EXPERTS)}
    assert overwritten_modules(model) == owners


def test_experts_that_are_overwritten_are_served_raw(
    newest: Newest, seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    loaded = load(models.get(MOE))
    if not newest.overwrote:
        pytest.skip("on this CPU this vLLM replaces no weights of experts")
    assert set(newest.overwrote) <= set(EXPERTS)
    assert log_lines.one("KEEP_RAW, as copies: ", "tensors copied")
    line = log_lines.one("serves target at", "raw layout")
    assert "KEEP_RAW, as copies: " in line
    assert "(false frees them)" in line
    assert pull(models.bare(MOE), served_address()).raw == seeds.disk(MOE) == loaded.raw


def test_without_copies_they_are_refused_by_name(
    newest: Newest, models: ModelStore, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What copies are for: the digests show the loss, but the raw layout is gone."""
    monkeypatch.setattr(recording, "overwritten_modules", lambda model: frozenset())
    loaded = load(models.get(MOE))
    if not newest.overwrote:
        pytest.skip("on this CPU this vLLM replaces no weights of experts")
    assert log_lines.one("raw tensors behind: ", "vLLM rewrote it in place")
    assert not log_lines.with_part("serves target at", "raw layout")
    del loaded


@pytest.mark.parametrize(("kind", "settings"), [("llama-bf16", {}), ("llama-w8a8", {"INT8_CACHE": "dram"})])
def test_dense_layers_lose_no_original(
    kind: str, settings: dict[str, Any], newest: Newest, seeds: Seeds, models: ModelStore, log_lines: LogLines
) -> None:
    loaded = load(models.get(kind), **settings)
    assert not log_lines.with_part("KEEP_RAW, as copies")
    assert log_lines.one("serves target at", "raw layout")
    assert pull(models.bare(kind), served_address()).raw == seeds.disk(kind) == loaded.raw


def test_copies_of_experts_that_stay_as_they_are_are_freed(
    newest: Newest, models: ModelStore, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend whose kernels take the weights as they are, under a name that is not known."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    monkeypatch.setattr(UnquantizedFusedMoEMethod, "process_weights_after_loading", lambda self, layer: None)
    loaded = load(models.get(MOE))
    assert log_lines.one("KEEP_RAW, as copies: ", "tensors copied")
    assert "as copies" not in log_lines.one("serves target at", "raw layout")
    assert (
        harness.raw_digests(loaded.model).items()
        >= {name: digest for name, digest in loaded.raw.items() if name.endswith(EXPERTS)}.items()
    )


def test_experts_of_triton_are_not_copied(
    newest: Newest, models: ModelStore, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    assert {backend.name for backend in UnquantizedMoeBackend} >= overwritten.LEAVE_WEIGHTS

    def backend(self: Any) -> Any:
        return UnquantizedMoeBackend.TRITON

    monkeypatch.setattr(
        UnquantizedFusedMoEMethod, "unquantized_backend", property(backend, lambda *_: None), raising=False
    )
    monkeypatch.setattr(UnquantizedFusedMoEMethod, "process_weights_after_loading", lambda self, layer: None)
    load(models.get(MOE))
    assert not log_lines.with_part("as copies")
    assert log_lines.one("serves target at", "raw layout")
