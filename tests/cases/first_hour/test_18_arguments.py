"""Arguments are checked before anything is sent, all at once, and each error has the name of its argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import netloader
from netloader.config import ConfigErrors
from netloader.errors import ConfigError

TENSORS = {"w": torch.zeros(4)}
SOURCES = ["192.0.2.1:19374"]
TOKEN = b"sixteen letters!"

PULL: dict[str, list[Any]] = {
    "tensors": [TENSORS.values(), "state_dict", None],
    "identity": ["m"],
    "sources": [SOURCES[0], 7, None, ["nohost"], [7]],
    "transport": [7, None],
    "timeout": [-1, 0, "5", math.nan, True],
    "wait": [-1, None, "5"],
    "stall_timeout": [0, -1, None],
    "token": ["sixteen letters!", b"short", b"x" * 4097, 7],
    "expect_root": ["abc", 7, "g" * 64],
    "progress": [7],
    "stripe": [0, 1.5, True],
    "follow": [1],
    "relay": ["10.0.0.7:1"],
    "observers": [7, [7]],
}
NEW = {name: PULL[name] for name in ("sources", "timeout", "wait", "stall_timeout", "token", "expect_root", "progress")}
NEW |= {"role": ["other", None], "layouts": ["raw", [], ["other"]], "max_bytes": [0, "1"], "device": [None]}
SERVER = {name: PULL[name] for name in ("identity", "transport", "token", "stall_timeout", "observers")}
SERVER |= {
    "tensors": [[TENSORS], 7],
    "host": [7, "no host!", ""],
    "port": [-1, 65536, "80", True],
    "max_clients": [0, -1, None, 1.5],
    "max_bandwidth": [0, -1, True, "fast", "500MB", float("nan"), float("inf"), []],
    "fan_out": [-1, None],
    "device": [7],
}
PROBE: dict[str, list[Any]] = {
    "source": [7, "nohost"],
    "timeout": [None, 0, "1"],
    "token": ["text"],
    "role": ["x"],
    "layouts": [["x"]],
}

CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, list[Any]]]] = {
    "pull": (netloader.sync.pull, {"tensors": TENSORS, "sources": SOURCES}, PULL),
    "pull_new": (netloader.sync.pull_new, {"sources": SOURCES}, NEW),
    "probe": (netloader.sync.probe, {"source": SOURCES[0]}, PROBE),
    "Server": (netloader.Server, {}, SERVER),
}


@pytest.fixture
def nothing_is_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: object, **__: object) -> None:
        pytest.fail("a connection was attempted")

    monkeypatch.setattr("netloader.client.pull.connect", refuse)
    monkeypatch.setattr("netloader.client.probe.connect", refuse)


@pytest.mark.usefixtures("nothing_is_connected")
@pytest.mark.parametrize(
    ("call", "name", "value"),
    [
        pytest.param(call, name, value, id=f"{call}-{name}-{number}")
        for call, (_, _, wrong) in CALLS.items()
        for name, values in wrong.items()
        for number, value in enumerate(values)
    ],
)
def test_a_wrong_argument_is_named(call: str, name: str, value: Any) -> None:
    function, usual, _ = CALLS[call]
    with pytest.raises(ConfigError) as caught:
        function(**{**usual, name: value})
    assert caught.value.field.partition("[")[0] == name
    assert "bug in netloader" not in str(caught.value)
    assert "allowed: " in str(caught.value)


@pytest.mark.usefixtures("nothing_is_connected")
@pytest.mark.parametrize("call", CALLS)
def test_all_wrong_arguments_are_named_at_once(call: str) -> None:
    function, usual, wrong = CALLS[call]
    with pytest.raises(ConfigErrors) as caught:
        function(**{**usual, **{name: values[0] for name, values in wrong.items()}})
    found = {problem.field.partition("[")[0] for problem in caught.value.problems}
    assert found == set(wrong)
    assert f"{len(wrong)} arguments are not valid" in str(caught.value)


@pytest.mark.parametrize("secret", ["a text of mine, secret", b"secret"])
def test_an_error_does_not_show_the_secret(secret: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        netloader.Server(token=secret)
    assert str(secret) not in str(caught.value)
    assert "secret" not in repr(vars(caught.value))


def test_right_values_are_accepted() -> None:
    netloader.Server(
        TENSORS, netloader.ModelIdentity(), host="[::1]", port=65535, token=TOKEN, max_clients=1, fan_out=0
    )
    assert netloader.Server(host=None, stall_timeout=1).port == 0


async def test_a_root_may_be_written_in_capitals() -> None:
    async with netloader.Server(TENSORS, host="127.0.0.1", transport="memory") as server:
        probed = await netloader.probe(server.address)
        root = probed.announcement.root.upper()
        _, report = await netloader.pull_new(sources=[server.address], transport="memory", expect_root=root)
    assert report.root == root.lower()
