"""The synchronous side has the signatures of the async side, so a type checker finds misspelt arguments.

`mypy --strict` reads this file too: each `type: ignore` below is an error of it that must be there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import netloader
from netloader import sync

PAIRS: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (sync.pull, netloader.pull),
    (sync.pull_new, netloader.pull_new),
    (sync.probe, netloader.probe),
    (sync.serve, netloader.Server),
    (sync.SyncServer.hold, netloader.Server.hold),
    (sync.SyncServer.retract, netloader.Server.retract),
]


@pytest.mark.parametrize(("blocking", "asynchronous"), PAIRS, ids=lambda function: function.__qualname__)
def test_signatures_are_those_of_the_async_side(blocking: Callable[..., Any], asynchronous: Callable[..., Any]) -> None:
    one, other = inspect.signature(blocking), inspect.signature(asynchronous)
    assert list(one.parameters.values()) == list(other.parameters.values())
    if blocking is not sync.serve:
        assert one.return_annotation == other.return_annotation


def test_arguments_arrive_under_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def spy(function: Callable[..., Any]) -> Callable[..., Any]:
        async def called(*arguments: Any, **named: Any) -> None:
            seen.update(inspect.signature(function).bind(*arguments, **named).arguments)

        return called

    for name in ("pull", "pull_new", "probe"):
        function = getattr(netloader, name)
        given = {parameter: object() for parameter in inspect.signature(function).parameters}
        monkeypatch.setattr(f"netloader.api.{name}", spy(function))
        seen.clear()
        getattr(sync, name)(**given)
        assert seen == given


def test_a_misspelt_argument_is_an_error_of_types_and_of_the_call() -> None:
    tensors, source = {"w": torch.zeros(4)}, "192.0.2.1:1"
    with pytest.raises(TypeError):
        sync.pull(tensors, surces=[source])  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        sync.pull_new(sources=[source], time_out=5)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        sync.probe(source, tokn=b"")  # type: ignore[call-arg]
    with pytest.raises(TypeError), sync.serve(tensors, prot=1):  # type: ignore[call-arg]
        pass
    with sync.serve(host="127.0.0.1") as server:
        with pytest.raises(TypeError):
            server.hold(tensors, week=True)  # type: ignore[call-arg]
        with pytest.raises(TypeError):
            server.retract(reasn="x")  # type: ignore[call-arg]


def test_an_argument_of_a_wrong_type_is_an_error_of_types() -> None:
    with pytest.raises(netloader.ConfigError):
        sync.pull({"w": torch.zeros(4)}, sources=["192.0.2.1:1"], token="text")  # type: ignore[arg-type]
