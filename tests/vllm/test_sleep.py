"""Sleep, wake-up and resets by the methods of vLLM's own worker class, over a model that is served.

vLLM has no sleep mode for CPUs. So its allocator is simulated, and so are the calls of the worker to the accelerator.
The worker is vLLM's own `Worker`, and its methods are wrapped as in an engine.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from netloader.errors import NetloaderError
from netloader.vllm.live import hooks, reloading
from netloader.vllm.live.reloading import ReloadRefused
from netloader.vllm.serve import serving
from tests.models import ModelStore
from tests.vllm import harness
from tests.vllm.pulls import LogLines, Seeds, extra, load, pull, source_of
from tests.vllm.reloads import outputs, reload, same

pytestmark = pytest.mark.usefixtures("needs_vllm")

KIND = "llama-bf16"
GARBAGE = 0.5


@dataclass
class Allocator:
    """A simulated sleep backend of vLLM: level 1 saves the weights, level 2 discards them.

    Attributes:
        model: The model whose weights it saves or discards.
        ask: Tries to pull from the server, as a client does.
        said: The answers of the server while the weights are saved or discarded.
    """

    model: torch.nn.Module
    ask: Callable[[], str]
    said: list[str] = field(default_factory=list)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    def suspend(self, level: int) -> None:
        self.said.append(self.ask())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if level == 1:
                    self.kept[name] = parameter.detach().clone()
                parameter.fill_(GARBAGE)

    def discard(self, tags: tuple[str, ...]) -> None:
        if "weights" in tags:
            self.suspend(2)

    def resume(self, tags: list[str] | None) -> None:
        if tags is None or "weights" in tags:
            with torch.no_grad():
                for name, tensor in self.kept.items():
                    self.model.get_parameter(name).copy_(tensor)
            self.kept.clear()


@pytest.fixture
def worker_class() -> Iterator[Any]:
    """vLLM's worker for accelerators, wrapped during the test."""
    from vllm.v1.worker.gpu_worker import Worker

    if not hasattr(Worker, "sleep_mode_backend"):
        pytest.skip("this vLLM's sleep has no place for a stand-in")
    before = dict(vars(Worker))
    assert hooks.wrap_worker(f"{Worker.__module__}.{Worker.__qualname__}")
    yield Worker
    for name, value in dict(vars(Worker)).items():
        if name not in before:
            delattr(Worker, name)
        elif before[name] is not value:
            setattr(Worker, name, before[name])


@dataclass
class Cast:
    """A worker and the model that it serves."""

    models: ModelStore
    worker: Any
    model: torch.nn.Module

    def __post_init__(self) -> None:
        self.allocator = Allocator(self.model, self.refusal)

    def refusal(self) -> str:
        """Why a pull from the worker is refused; empty when it succeeds."""
        server = serving.running_server()
        assert server is not None
        try:
            pull(self.models.bare(KIND), server.address, FALLBACK=False)
        except NetloaderError as error:
            return str(error)
        return ""

    def config(self, source: str) -> Any:
        """The configuration of a worker that pulls from `source`."""
        return harness.engine_config(self.models.bare(KIND), load_format="netloader", extra=extra([source]))


@pytest.fixture
def cast(worker_class: Any, seeds: Seeds, models: ModelStore, monkeypatch: pytest.MonkeyPatch) -> Cast:
    from vllm.v1.worker.worker_base import WorkerBase

    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (1, 2))
    with source_of(seeds.get(KIND).holding) as source:
        model = load(models.bare(KIND), source).model
        config = harness.engine_config(models.bare(KIND), load_format="netloader", extra=extra([source]))
    worker = worker_class(config, 0, 0, "file:///not-used")
    assert isinstance(worker, WorkerBase)
    made = Cast(models, worker, model)
    worker._sleep_mode_backend = made.allocator
    worker.model_runner = SimpleNamespace(
        model=model,
        get_model=lambda: model,
        get_draft_model=lambda: None,
        reload_weights=lambda **options: reload(model, worker.vllm_config, finish=False, **options),
    )
    assert made.refusal() == ""
    return made


def test_weights_that_sleep_are_not_served_and_are_when_they_wake_up(cast: Cast) -> None:
    before = harness.raw_digests(cast.model)
    cast.worker.sleep(1)
    (said,) = cast.allocator.said
    assert "about to change (sleep)" in said, "clients are told before the memory is gone"
    assert harness.raw_digests(cast.model) != before
    assert "about to change (sleep)" in cast.refusal()
    cast.worker.wake_up(["kv_cache"])
    assert "about to change (sleep)" in cast.refusal()
    cast.worker.wake_up(["weights"])
    assert harness.raw_digests(cast.model) == before
    assert cast.refusal() == ""


def test_discarded_weights_are_not_served_until_they_are_reloaded(
    cast: Cast, seeds: Seeds, log_lines: LogLines
) -> None:
    before, digests = outputs(cast.model), harness.raw_digests(cast.model)
    cast.worker.sleep(2)
    cast.worker.wake_up()
    assert harness.raw_digests(cast.model) != digests
    assert log_lines.one("what was served before sleep is not served any more", "is not what it was")
    assert cast.refusal()
    with source_of(seeds.get(KIND).holding) as source:
        cast.worker.vllm_config = cast.config(source)
        cast.worker.reload_weights()
    assert log_lines.one("reloaded, root")
    assert same(outputs(cast.model), before)
    assert harness.raw_digests(cast.model) == digests
    assert cast.refusal() == ""


def test_weights_of_a_discarded_tag_are_not_served_until_they_are_reloaded(
    cast: Cast, seeds: Seeds, log_lines: LogLines
) -> None:
    if not hasattr(cast.worker, hooks.DISCARDS):
        pytest.skip("this vLLM discards nothing by tag")
    digests = harness.raw_digests(cast.model)
    cast.worker.discard(("kv_cache",))
    assert cast.allocator.said == []
    assert cast.refusal() == "", "the weights are still there"
    cast.worker.discard(("weights", "kv_cache"))
    (said,) = cast.allocator.said
    assert "about to change (discard)" in said, "clients are told before the memory is gone"
    cast.worker.wake_up()
    assert harness.raw_digests(cast.model) != digests
    assert "about to change (discard)" in cast.refusal(), "waking up brings memory back, and no weights"
    with source_of(seeds.get(KIND).holding) as source:
        cast.worker.vllm_config = cast.config(source)
        cast.worker.reload_weights()
    assert log_lines.one("reloaded, root")
    assert harness.raw_digests(cast.model) == digests
    assert cast.refusal() == ""


def nothing_is_left_of(model: torch.nn.Module) -> bool:
    """Whether neither staging memory nor our `load_weights` is attached to a model."""
    gc.collect()
    return not [
        name
        for name in vars(model)
        if name in {"load_weights", "_netloader_reload", "_netloader_paused", "_netloader_computed"}
    ]


def test_a_reload_with_arguments_of_its_own_is_served_afterwards(cast: Cast, seeds: Seeds, log_lines: LogLines) -> None:
    before = outputs(cast.model)
    with source_of(seeds.get(KIND).holding) as source:
        cast.worker.vllm_config = cast.config(source)
        cast.worker.reload_weights(is_checkpoint_format=True)
    assert log_lines.one("reloaded, root")
    assert nothing_is_left_of(cast.model)
    assert same(outputs(cast.model), before)
    assert cast.refusal() == ""


def test_raw_weights_are_not_taken_for_processed_ones(cast: Cast, seeds: Seeds) -> None:
    before = harness.raw_digests(cast.model)
    with source_of(seeds.get(KIND).holding) as source:
        cast.worker.vllm_config = cast.config(source)
        with pytest.raises(ReloadRefused, match="called for weights that are processed already"):
            cast.worker.reload_weights(is_checkpoint_format=False)
    assert harness.raw_digests(cast.model) == before
    assert nothing_is_left_of(cast.model)
    assert cast.refusal() == "", "what did not change is served again"


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("step", ["initialize_layerwise_reload", "finalize_layerwise_reload"])
def test_a_reload_that_fails_frees_what_it_pulled(
    step: str, changed: bool, cast: Cast, seeds: Seeds, monkeypatch: pytest.MonkeyPatch, log_lines: LogLines
) -> None:
    from vllm.model_executor.model_loader.reload import inplace

    original = getattr(inplace, step)
    made: list[weakref.ref[torch.Tensor]] = []
    staging = reloading._staging

    def staged(announcement: Any) -> dict[str, torch.Tensor]:
        tensors = staging(announcement)
        made.extend(map(weakref.ref, tensors.values()))
        return tensors

    def fail(*arguments: Any) -> None:
        if step == "finalize_layerwise_reload":
            original(*arguments)
        if changed:
            with torch.no_grad():
                next(cast.model.parameters()).fill_(GARBAGE)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(reloading, "_staging", staged)
    monkeypatch.setattr(inplace, step, fail)
    with source_of(seeds.get(KIND).holding) as source:
        cast.worker.vllm_config = cast.config(source)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            cast.worker.reload_weights()
        monkeypatch.undo()
        assert nothing_is_left_of(cast.model)
        assert made
        assert not [found for reference in made if (found := reference()) is not None and found.numel()]
        if changed:
            assert "is not what it was when it was announced" in cast.refusal()
            assert log_lines.one("what was served before the reload is not served any more")
        else:
            assert cast.refusal() == "", "what did not change is served again"
            assert log_lines.one("serves its target again", "the reload broke")


def test_weights_that_are_reset_are_not_served(cast: Cast) -> None:
    before = harness.raw_digests(cast.model)
    cast.worker.reset_weights()
    assert harness.raw_digests(cast.model) != before
    assert "about to change (reset_weights)" in cast.refusal()


def test_sleep_of_the_cpu_worker_is_not_wrapped(cast: Cast, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker

    before = dict(vars(CPUWorker))
    try:
        assert hooks.wrap_worker(f"{CPUWorker.__module__}.{CPUWorker.__qualname__}")
        assert vars(CPUWorker)["sleep"] is before["sleep"]
        assert vars(CPUWorker).get(hooks.DISCARDS) is before.get(hooks.DISCARDS)
        worker = CPUWorker.__new__(CPUWorker)
        worker.sleep(1)
        assert cast.refusal() == ""
        worker.wake_up()
        assert cast.refusal() == ""
    finally:
        for name in set(vars(CPUWorker)) - set(before):
            delattr(CPUWorker, name)
