"""A reload of a live model: what is reported to the other ranks, and what stays attached to the model. Without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from netloader.config import Config, load_config
from netloader.core.identity import ModelIdentity
from netloader.tensors import hold
from netloader.vllm.live import reloading
from netloader.vllm.live.reloading import ReloadRefused, finish_reload, record_loaded, weights_for_reload
from netloader.vllm.model.agreement import Report
from netloader.vllm.model.snapshot import named_raw_tensors

PATH = "/models/m"
MODEL_CONFIG = SimpleNamespace(model=PATH)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Report]:
    """The reports that this rank, which is alone, sends to the other ranks."""
    found: list[Report] = []

    def exchange(mine: Report, *_: Any) -> tuple[Report, ...]:
        found.append(mine)
        return (mine,)

    monkeypatch.setattr(reloading, "topology_of", lambda *_: SimpleNamespace(rank=0))
    monkeypatch.setattr(reloading, "groups_of_this_engine", lambda **_: [])
    monkeypatch.setattr(reloading, "exchange", exchange)
    monkeypatch.setattr(reloading, "_why_not", lambda *_: "")
    return found


def config_of() -> Config:
    return load_config({"SOURCE": [{"device_id": 0, "sources": ["127.0.0.1:1024"]}]})


def loaded() -> torch.nn.Module:
    """A model that this loader has loaded."""
    model = torch.nn.Linear(4, 4)
    record_loaded(model, hold(named_raw_tensors(model), ModelIdentity(model="m")).announcement, PATH)
    return model


def reloaded(model: torch.nn.Module) -> Any:
    return weights_for_reload(SimpleNamespace(), MODEL_CONFIG, SimpleNamespace(), config_of(), model)


def report_of(model: torch.nn.Module, **identity: Any) -> Any:
    """The report of a pull that succeeded."""
    announcement = vars(model)["_netloader_loaded"].announcement
    return SimpleNamespace(identity=ModelIdentity(model="m", **identity), root="ab" * 16, announcement=announcement)


@pytest.mark.parametrize("step", ["_why_not", "_staging", "pull_raw"])
def test_an_unexpected_error_is_reported_to_the_other_ranks(
    step: str, reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would wait until TIMEOUT, and their process groups could not be used after that."""

    def fails(*_: Any) -> None:
        raise KeyError("no such layer")

    monkeypatch.setattr(reloading, step, fails)
    with pytest.raises(ReloadRefused, match="unexpected KeyError: 'no such layer'"):
        reloaded(loaded())
    assert [report.outcome for report in reports] == ["failed"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "no memory for the new weights"),
        (RuntimeError("device-side assert"), "unexpected RuntimeError: device-side assert"),
    ],
)
def test_only_an_allocation_that_failed_is_called_a_lack_of_memory(
    error: Exception, reason: str, reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(reloading, "_staging", fails)
    with pytest.raises(ReloadRefused, match=reason):
        reloaded(loaded())
    assert reports[0].reason.startswith(reason)


@pytest.mark.parametrize("field", ["load", "fingerprint"])
def test_a_source_whose_digests_are_none_is_refused(
    field: str, reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are sent on to other ranks and to clients."""
    model = loaded()
    monkeypatch.setattr(reloading, "pull_raw", lambda *_: report_of(model, **{field: "no digest"}))
    with pytest.raises(ReloadRefused, match=f"the source's {field} is no digest: 'no digest'"):
        reloaded(model)
    assert [report.outcome for report in reports] == ["failed"]


def test_weights_that_vllm_did_not_load_leave_nothing_attached_to_the_model(
    reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replaced `load_weights` would take the weights of the next reload for raw tensors."""
    model = loaded()
    before = set(vars(model))
    monkeypatch.setattr(reloading, "pull_raw", lambda *_: report_of(model))
    reloaded(model)
    assert "load_weights" in vars(model)
    finish_reload(model)
    assert set(vars(model)) == before
    assert [report.outcome for report in reports] == ["pulled"]
