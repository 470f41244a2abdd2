"""What happens before vLLM changes weights in place; with simulated worker classes."""

from __future__ import annotations

import logging
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from netloader import sync
from netloader.config import load_config
from netloader.core.identity import ModelIdentity
from netloader.errors import ManifestError, NetloaderError, NoSourceLeft
from netloader.tensors import computed, digests, hold
from netloader.transports.hccl import devices
from netloader.vllm.live import hooks
from netloader.vllm.model.copies import Keep
from netloader.vllm.model.snapshot import RawWeights
from netloader.vllm.serve import server_loop, serving
from netloader.vllm.serve.raw_holding import raw_holding

MODULE = "tests_stand_in_worker"
WEIGHT = torch.arange(1000, dtype=torch.float32)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[serving.WorkerServer]:
    """The process's server, with a target and a draft."""
    made = serving.worker_server(load_config({"LISTEN_HOST": "127.0.0.1"}), 0, "cpu")
    assert made is not None
    for role in ("target", "draft"):
        made.offer(hold({"weight": WEIGHT.clone()}, ModelIdentity(model="m", role=role)), "a test")
    yield made
    serving.stop_server()


def worker(monkeypatch: pytest.MonkeyPatch, **methods: Any) -> Any:
    """An object of a wrapped worker class with these methods."""
    config = types.SimpleNamespace(load_config=types.SimpleNamespace(load_format="auto"))
    stand_in = type("Worker", (), {**methods, "vllm_config": config, "device": "npu:7"})
    module = types.ModuleType(MODULE)
    vars(module)["Worker"] = stand_in
    monkeypatch.setitem(sys.modules, MODULE, module)
    assert hooks.wrap_worker(f"{MODULE}.Worker")
    return stand_in()


def pulled(server: serving.WorkerServer, role: str) -> torch.Tensor:
    into = {"weight": torch.zeros(1000)}
    identity = ModelIdentity(model="m", role=role)  # type: ignore[arg-type]
    sync.pull(into, identity, sources=[server.address])
    return into["weight"]


@pytest.mark.parametrize("method", hooks.CHANGES)
def test_what_is_about_to_change_is_retracted_first(
    method: str, server: serving.WorkerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def change(self: Any, *arguments: Any) -> str:
        for role in serving.ROLES:
            with pytest.raises(NoSourceLeft, match=rf"about to change \({method}\)"):
                pulled(server, role)
            seen.append(role)
        return "changed"

    assert getattr(worker(monkeypatch, **{method: change}), method)(1) == "changed"
    assert seen == ["target", "draft"]


@pytest.mark.parametrize("tags", [("weights",), ("kv_cache", "weights"), ["weights"], "weights"])
@pytest.mark.parametrize("by_name", [False, True])
def test_discarded_weights_are_retracted_first(
    tags: Any, by_name: bool, server: serving.WorkerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def discard(self: Any, tags: Any) -> None:
        for role in serving.ROLES:
            with pytest.raises(NoSourceLeft, match=r"about to change \(discard\)"):
                pulled(server, role)
            seen.append(role)

    one = worker(monkeypatch, discard=discard, wake_up=lambda self, tags=None: None)
    if by_name:
        one.discard(tags=tags)
    else:
        one.discard(tags)
    assert seen == ["target", "draft"]
    one.wake_up()
    with pytest.raises(NoSourceLeft, match=r"about to change \(discard\)"):
        pulled(server, "target")


def test_weights_are_served_while_other_memory_is_discarded(
    server: serving.WorkerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def discard(self: Any, tags: Any) -> str:
        assert torch.equal(pulled(server, "target"), WEIGHT)
        return "discarded"

    assert worker(monkeypatch, discard=discard).discard(("kv_cache",)) == "discarded"
    assert torch.equal(pulled(server, "draft"), WEIGHT)


def test_a_class_is_wrapped_once_and_an_unknown_class_is_not(
    server: serving.WorkerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    one = worker(monkeypatch, sleep=lambda self: calls.append(1))
    first = type(one).sleep
    assert hooks.wrap_worker(f"{MODULE}.Worker")
    assert type(one).sleep is first
    one.sleep()
    assert calls == [1]
    assert not hooks.wrap_worker("tests_no_such_module.Worker")
    assert not hooks.wrap_worker(f"{MODULE}.NoSuchClass")


def test_weights_that_wake_up_unchanged_are_served_again_and_others_not(
    server: serving.WorkerServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = worker(monkeypatch, sleep=lambda self, level=1: None, wake_up=lambda self, tags=None: None)
    one.sleep()
    with pytest.raises(NoSourceLeft):
        pulled(server, "target")
    one.wake_up(["kv_cache"])
    with pytest.raises(NoSourceLeft):
        pulled(server, "target")
    one.wake_up()
    assert torch.equal(pulled(server, "target"), WEIGHT)
    assert torch.equal(pulled(server, "draft"), WEIGHT)
    one.sleep()
    (held,) = server._paused["target"]
    plan = held.announcement.plan
    held.memory.views(plan, [0])[0].tensors()[0][17] += 1
    with caplog.at_level(logging.WARNING):
        one.wake_up(tags=["weights"])
    assert "is not what it was" in caplog.text
    with pytest.raises(NoSourceLeft):
        pulled(server, "target")


SLEEPS: dict[str, Any] = {"sleep": lambda self, level=1: "slept", "wake_up": lambda self, tags=None: "woke"}


@pytest.mark.allow_blocking(reason="a loop that stands still is what is looked at")
def test_a_blocked_server_loop_does_not_keep_the_engine_from_sleeping(
    server: serving.WorkerServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server_loop, "ANSWER_TIMEOUT", 0.05)
    monkeypatch.setattr(serving, "_RETRACT_WITHIN", 0.05)
    one = worker(monkeypatch, **SLEEPS)
    goes_on = threading.Event()
    server._loop._loop.call_soon_threadsafe(goes_on.wait)
    try:
        assert one.sleep() == "slept"
        assert "retracting what is served before sleep failed" in caplog.text
        assert "gives no answer: its event loop stood still" in caplog.text
        assert serving.running_server() is None, "it was ended, so there is no second wait"
        assert one.wake_up() == "woke"
        with pytest.raises(server_loop.ServerLost):
            server.retract(serving.ROLES, "asked once more")
    finally:
        goes_on.set()
    server._loop._thread.join(30)
    assert not server._loop.alive, "it ends as soon as it goes on, and serves nothing that may have changed"


def test_an_ended_server_loop_does_not_keep_the_engine_from_sleeping(
    server: serving.WorkerServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = worker(monkeypatch, **SLEEPS)
    server._loop.end(30)
    monkeypatch.setattr(server_loop.ServerLoop, "alive", True)  # as in the moment before it ended
    assert serving.running_server() is server
    assert one.sleep() == "slept"
    assert "retracting what is served before sleep failed" in caplog.text
    assert one.wake_up() == "woke"
    assert serving.running_server() is None


@pytest.mark.parametrize("error", [MemoryError("none left"), RecursionError("too deep"), RuntimeError("device lost")])
def test_an_error_of_serving_during_wake_up_is_logged_and_refused(
    error: Exception,
    server: serving.WorkerServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(holding: object) -> None:
        raise error

    one = worker(monkeypatch, **SLEEPS)
    one.sleep()
    monkeypatch.setattr(serving, "check_unchanged", fail)
    assert one.wake_up() == "woke"
    assert "Traceback" in caplog.text
    for role in serving.ROLES:
        with pytest.raises(NoSourceLeft, match=f"serving again after wake_up failed: {type(error).__name__}: {error}"):
            pulled(server, role)


def test_a_server_that_cannot_even_refuse_is_ended(
    server: serving.WorkerServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("broken")

    one = worker(monkeypatch, **SLEEPS)
    monkeypatch.setattr(server, "pause", fail)
    monkeypatch.setattr(server, "refuse", fail)
    assert one.sleep() == "slept"
    assert "can't be told to refuse, and is ended" in caplog.text
    assert not server.running


def test_weights_that_changed_during_sleep_are_refused_by_name(
    server: serving.WorkerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = worker(monkeypatch, **SLEEPS)
    one.sleep()
    (held,) = server._paused["target"]
    held.memory.views(held.announcement.plan, [0])[0].tensors()[0][17] += 1
    one.wake_up()
    with pytest.raises(NoSourceLeft, match="weight is not what it was when it was announced"):
        pulled(server, "target")
    assert torch.equal(pulled(server, "draft"), WEIGHT), "the other model is still served"


def test_an_error_of_the_wrapped_method_is_raised(
    server: serving.WorkerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        worker(monkeypatch, start_weight_update=fail).start_weight_update()
    with pytest.raises(NoSourceLeft):
        pulled(server, "target")


@pytest.mark.parametrize("name", ["npu:7", "npu"])
def test_no_communicator_is_opened_until_memory_was_measured(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    chosen = types.SimpleNamespace(current_device=lambda: 7)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: chosen)

    def measure(self: Any) -> int:
        with pytest.raises(NetloaderError, match="measuring its memory") as caught:
            devices.device_of("npu:7").check_may_open()
        assert caught.value.retry_after > 0  # type: ignore[attr-defined]
        return 42

    one = worker(monkeypatch, determine_available_memory=measure)
    hooks.pause_transfers_until_profiled("cpu")
    hooks.pause_transfers_until_profiled(name)
    assert one.determine_available_memory() == 42
    devices.device_of("npu:7").check_may_open()


def test_wake_up_hashes_in_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine waits for it."""
    both = threading.Barrier(2, timeout=30)
    original = digests.digest_of

    def meet(*arguments: Any) -> bytes:
        if not met.is_set():
            both.wait()
            met.set()
        return original(*arguments)

    holding = hold({"w": torch.arange(64 * 1024, dtype=torch.float32)}, ModelIdentity(model="m"), block_bytes=1024)
    met = threading.Event()
    monkeypatch.setattr(digests, "digest_of", meet)
    serving.check_unchanged(holding)
    assert met.is_set()


def test_nothing_is_computed_on_the_device_while_graphs_are_captured(
    server: serving.WorkerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.rand(64, 48))
    announcement = hold(dict(model.named_parameters()), ModelIdentity(model="m")).announcement
    raw = RawWeights(model, announcement, lambda _: Keep.NO)
    model.weight = torch.nn.Parameter(model.weight.detach().t().contiguous())
    holding = raw_holding(announcement, "cpu", raw.locate(model), "ab" * 16)
    server.offer(holding, "a test")
    monkeypatch.setattr(computed, "_PAUSED_SECONDS", 0.01)
    seen: list[str] = []

    def capture(self: Any) -> int:
        with pytest.raises(ManifestError, match="does not end") as caught, holding.memory.scratch.paused():
            pass
        seen.append(caught.value.message)
        return 7

    assert worker(monkeypatch, compile_or_warm_up_model=capture).compile_or_warm_up_model() == 7
    assert seen
    with holding.memory.scratch.paused():
        pass


def test_a_capture_is_not_ended_by_a_server_that_does_not_answer(
    server: serving.WorkerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    one = worker(monkeypatch, compile_or_warm_up_model=lambda self: 7)
    with monkeypatch.context() as patch:
        patch.setattr(server, "computes_nothing", broken)
        assert one.compile_or_warm_up_model() == 7
    with pytest.raises(NoSourceLeft, match="pausing computations while graphs are captured failed"):
        pulled(server, "target")
