"""A fault in the configuration is found when vLLM reads its arguments; its text is the last one and stands alone."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from netloader.errors import ConfigError
from netloader.vllm.early_check import check_configuration_early

MODULE = "vllm.engine.arg_utils"
WRONG = {"CONFIG_FILE": "/absent/netloader.json"}


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """A stand-in for the class that holds vLLM's arguments, of a process in which vLLM has called the plugin twice."""

    class EngineArgs:
        def __init__(self, load_format: str, extra: Any, **others: Any) -> None:
            self.load_format, self.model_loader_extra_config = load_format, extra
            vars(self).update(others)

        def create_load_config(self) -> str:
            return "made"

    monkeypatch.setitem(sys.modules, MODULE, SimpleNamespace(EngineArgs=EngineArgs))
    check_configuration_early()
    check_configuration_early()
    return EngineArgs


@pytest.mark.parametrize("load_format", ["netloader", "NetLoader", "netloader_p2p"])
def test_a_wrong_path_is_an_error_and_a_line_of_its_own(
    load_format: str, arguments: type[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"CONFIG_FILE = ./absent/netloader\.json. is not valid") as caught:
        arguments(load_format, WRONG).create_load_config()
    (record,) = caplog.records
    assert (record.levelno, record.exc_info) == (logging.ERROR, None)
    assert record.getMessage() == f"netloader: {caught.value}"
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "made",
    [
        ("netloader", {"MODEL": "m"}, {}),
        ("netloader", None, {}),
        ("auto", WRONG, {}),
        ("netloader", WRONG, {"distributed_executor_backend": "ray"}),  # the file may be on the worker's host only
        ("netloader", WRONG, {"nnodes": 2}),
    ],
)
def test_other_arguments_pass(made: tuple[Any, ...], arguments: type[Any]) -> None:
    load_format, extra, others = made
    assert arguments(load_format, extra, **others).create_load_config() == "made"


def test_a_process_that_parses_no_arguments_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    check_configuration_early()
    assert MODULE not in sys.modules
