"""Probing sources before the model is built: which sources are probed again, and for how long."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from netloader import sync
from netloader.config import Config, load_config
from netloader.core.addresses import Address
from netloader.core.identity import ModelIdentity
from netloader.errors import (
    NetloaderError,
    PeerLost,
    RefusedError,
    RemoteProtocolError,
    TransferTimeout,
)
from netloader.vllm.load import pulling
from netloader.vllm.load.pulling import probe_sources, pull_raw

A, B = Address("a", 1024), Address("b", 1024)
FOUND = ModelIdentity(model="m")


class World:
    """Simulated sources, and a clock that advances only when they or a pause take time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answers: Callable[[str, int, float], NetloaderError | None]):
        self.now = 0.0
        self.asked: list[str] = []
        self._answers = answers
        monkeypatch.setattr(pulling, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self._pause))
        monkeypatch.setattr(sync, "probe", self._probe)

    def _pause(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds

    def _probe(self, source: Address, *, timeout: float, **_: Any) -> Any:
        host = source.host
        self.asked.append(host)
        error = self._answers(host, self.asked.count(host), timeout)
        if isinstance(error, TransferTimeout):
            self.now += timeout
        if error is not None:
            raise error
        return SimpleNamespace(announcement=SimpleNamespace(identity=FOUND))


def config(**settings: Any) -> Config:
    return load_config({"MODEL": "m", **settings})


@pytest.mark.parametrize(
    "error",
    [PeerLost("down"), *(RefusedError(code, "not now") for code in ("not-ready", "busy", "gone"))],
    ids=["down", "not-ready", "busy", "gone"],
)
def test_a_source_that_may_be_ready_soon_is_probed_again(
    error: NetloaderError, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(monkeypatch, lambda _, times, __: error if times < 4 else None)
    assert probe_sources([A], "target", config(WAIT=30)) is FOUND
    assert world.asked == ["a"] * 4
    assert world.now < 30


@pytest.mark.parametrize(
    "error",
    [RefusedError("auth", "who are you"), RefusedError("not-held", "no draft"), RemoteProtocolError("garbage")],
    ids=["auth", "not-held", "garbage"],
)
def test_a_source_with_a_lasting_refusal_is_probed_once(error: NetloaderError, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, lambda *_: error)
    assert probe_sources([A], "target", config(WAIT=600, TIMEOUT=700)) is None
    assert world.asked == ["a"]
    assert world.now < 1


def test_such_a_source_is_left_out_while_another_one_is_probed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(host: str, times: int, _: float) -> NetloaderError | None:
        if host == "a":
            return RefusedError("not-held", "no draft")
        return PeerLost("down") if times < 3 else None

    world = World(monkeypatch, answer)
    assert probe_sources([A, B], "target", config(WAIT=60)) is FOUND
    assert world.asked == ["a", "b", "b", "b"]


def test_without_wait_each_source_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, lambda *_: PeerLost("down"))
    assert probe_sources([A, B], "target", config()) is None
    assert world.asked == ["a", "b"]


@pytest.mark.parametrize("wait", [0, 20])
def test_many_silent_sources_take_no_longer_than_one(wait: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks wait for WAIT plus a few seconds, not for each source in turn."""
    world = World(monkeypatch, lambda *_: TransferTimeout("silent"))
    assert probe_sources([A, B] * 20, "target", config(WAIT=wait)) is None
    assert world.now <= wait + 10


def test_the_time_of_the_probe_counts_against_timeout_and_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks wait for one TIMEOUT, which includes WAIT."""
    seen: list[tuple[float, float]] = []

    def pull(*_: Any, timeout: float, wait: float, **__: Any) -> None:
        seen.append((timeout, wait))

    monkeypatch.setattr(sync, "pull", pull)
    settings = config(WAIT=30, TIMEOUT=100)
    for spent in (0.0, 12.0, 70.0, 500.0):
        pull_raw({}, FOUND, [A], settings, spent)
    assert seen == [(100, 30), (88, 18), (30, 0), (0.001, 0)]


def test_waiting_is_said_as_waiting_and_not_in_every_round(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    loading = RefusedError("not-ready", "the model is still being loaded")
    World(monkeypatch, lambda host, times, _: loading if times < 60 else None)
    assert probe_sources([A, B], "target", config(WAIT=120)) is FOUND
    first, *others = [record.getMessage() for record in caplog.records]
    assert first == "netloader: waiting for a:1024 and 1 more: the model is still being loaded, 0 of 120 s"
    assert [line.rpartition(", ")[2] for line in others] == ["10 of 120 s", "20 of 120 s"]
