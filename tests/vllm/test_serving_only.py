"""Code that is for serving only may fail in any way: the model is loaded, and clients are told the reason."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from netloader import tensors
from netloader.errors import NetloaderError
from netloader.vllm import loader
from netloader.vllm.load import examine_model, inspect_engine, loading, pull_together
from netloader.vllm.model import snapshot
from netloader.vllm.serve import recording, serving
from tests.models import ModelStore
from tests.vllm.pulls import LogLines, Seeds, load, pull, source_of

pytestmark = pytest.mark.usefixtures("needs_vllm")

KIND = "llama-bf16"
ERRORS = [MemoryError("none left"), RecursionError("too deep"), RuntimeError("CUDA out of memory")]
FAULTS: dict[str, list[tuple[Any, str]]] = {
    "recording the weights": [(tensors, "hold"), (recording, "RawWeights"), (recording, "quantised_modules")],
    "offering the weights": [(snapshot.RawWeights, "locate"), (loading, "choose_layout"), (loading, "serve")],
    "what the model has beside its weights": [(recording, "UnnamedTensors")],
    "looking at the model": [(examine_model, "named_raw_tensors"), (inspect_engine, "model_identity")],
}


def failing(error: Exception) -> Any:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("what", "owner", "name"),
    [pytest.param(what, owner, name, id=name) for what, places in FAULTS.items() for owner, name in places],
)
def test_a_load_succeeds_and_clients_are_told_the_reason(
    what: str,
    owner: Any,
    name: str,
    error: Exception,
    seeds: Seeds,
    models: ModelStore,
    monkeypatch: pytest.MonkeyPatch,
    log_lines: LogLines,
) -> None:
    tracebacks: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(error))
        patch.setattr(log_lines, "emit", lambda record: tracebacks.append(record.exc_info))
        assert load(models.get(KIND)).raw == seeds.disk(KIND)
    assert any(found and found[1] is error for found in tracebacks), "it is logged with its traceback"
    server = serving.running_server()
    assert server is not None
    with pytest.raises(NetloaderError, match=what):
        pull(models.bare(KIND), server.address, FALLBACK=False)


@pytest.mark.parametrize("owner", [inspect_engine, serving.WorkerServer], ids=["start", "expect"])
def test_a_server_that_does_not_come_up_costs_the_server_only(
    owner: Any, seeds: Seeds, models: ModelStore, monkeypatch: pytest.MonkeyPatch, log_lines: LogLines
) -> None:
    name = "worker_server" if owner is inspect_engine else "expect"
    monkeypatch.setattr(owner, name, failing(RuntimeError("can't start new thread")))
    assert load(models.get(KIND)).raw == seeds.disk(KIND)
    assert log_lines.with_part("failed, which costs what is served and nothing else")


def test_weights_are_pulled_though_nothing_of_them_can_be_recorded(
    seeds: Seeds, models: ModelStore, monkeypatch: pytest.MonkeyPatch, log_lines: LogLines
) -> None:
    seed = seeds.get(KIND)
    monkeypatch.setattr(recording, "UnnamedTensors", failing(MemoryError("none left")))
    monkeypatch.setattr(serving.WorkerServer, "withdraw", failing(RuntimeError("no loop")))
    with source_of(seed.holding) as source:
        assert load(models.bare(KIND), source, FALLBACK=False).raw == seeds.disk(KIND)
    assert log_lines.one("noting what the model has beside its weights failed")
    assert log_lines.one("does not serve its target")
    assert log_lines.with_part("passing on what was pulled failed")


def test_a_server_that_is_lost_during_the_load_costs_the_server_only(
    seeds: Seeds, models: ModelStore, monkeypatch: pytest.MonkeyPatch, log_lines: LogLines
) -> None:
    seed, original = seeds.get(KIND), serving.WorkerServer.pull

    def pull_without_loop(self: serving.WorkerServer, *arguments: Any, **options: Any) -> Any:
        self._loop.end(30)
        return original(self, *arguments, **options)

    monkeypatch.setattr(serving.WorkerServer, "pull", pull_without_loop)
    with source_of(seed.holding) as source:
        assert load(models.bare(KIND), source, FALLBACK=False).raw == seeds.disk(KIND)
    assert log_lines.one("nothing is passed on while the weights are pulled")
    assert serving.running_server() is None


def test_an_error_of_the_load_itself_is_told_and_comes_out(
    models: ModelStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The control: the guard is around serving, and nothing else."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(pull_together, "pull", failing(MemoryError("none left")))
    with pytest.raises(MemoryError):
        load(models.get(KIND))


def test_a_load_succeeds_although_the_worker_cannot_be_wrapped(
    seeds: Seeds, models: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "wrap_worker", failing(RuntimeError("no such attribute")))
    assert load(models.get(KIND)).raw == seeds.disk(KIND)
