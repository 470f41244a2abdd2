"""Processes with an engine of vllm-ascend each, on one simulated card each: see `tests.ascend.engine`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.ascend.kinds import KINDS, Store
from tests.hccl.processes import ROOT, Child, clean_environment
from tests.preloaded import PYTHON

FAKES = ROOT / "tests" / "npu_sim" / "fakes"
PATIENCE = 240.0
"""Seconds for one load, where the first one of a kind lets vLLM examine the model in a process of its own."""

LIBRARIES = ("torch", "tests.ascend.warm")
"""What a process imports before it forks engines: see `tests.preloaded`."""


class EngineFailed(AssertionError):
    """An engine answered with an error."""


def environment(**more: str) -> dict[str, str]:
    """Of a process with the simulator in which vLLM finds nothing but files."""
    return clean_environment(
        {
            "PYTHONPATH": os.pathsep.join([str(FAKES), str(ROOT)]),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            **more,
        }
    )


class Engine(Child):
    """One rank's process.

    Args:
        card: The card that it has.
        folder: In which the ranks of one engine meet.
        rank: Of this process.
        python: The interpreter; ``sys.executable`` for one that imports everything itself.
        more: More environment variables.
    """

    def __init__(
        self,
        card: int,
        folder: Path,
        rank: int = 0,
        python: str = PYTHON,
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._of_rank = {"rank": rank, "store": str(folder / "store")}
        variables = environment(ASCEND_RT_VISIBLE_DEVICES=str(card), **more)
        super().__init__(variables, module="tests.ascend.engine", python=python)

    def request(self, what: str, **task: Any) -> None:
        """Send a request: a method of `tests.ascend.engine.Engine` and what it needs."""
        self.tell(json.dumps({"do": what, **self._of_rank, **task}))

    def answer(self) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            EngineFailed: With the end of what the process logged.
        """
        answer = self.heard(PATIENCE)
        if "error" in answer:
            raise EngineFailed(f"{answer['error']}\n{self.text()}")
        return answer

    def call(self, what: str, **task: Any) -> dict[str, Any]:
        """Send a request and return its answer."""
        self.request(what, **task)
        return self.answer()

    def load(
        self, what: str, model: Path, arguments: Mapping[str, Any], extra: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Load a model, with netloader if there are settings for it: the answer to `load` or `survey`."""
        self.begin_load(model, arguments, extra, what=what)
        return self.answer()

    def begin_load(
        self,
        model: Path,
        arguments: Mapping[str, Any],
        extra: Mapping[str, Any] | None = None,
        *,
        what: str = "load",
        **more: Any,
    ) -> None:
        """Send the request of `load`, and more for it."""
        load_format = "auto" if extra is None else "netloader"
        settings = {"load_format": load_format, "extra": dict(extra or {}), "arguments": dict(arguments)}
        self.request(what, model=str(model), **settings, **more)


def surveyed(name: str, store: Store, folder: Path) -> dict[str, Any]:
    """The rows of one kind of model, loaded from its files in a process of its own."""
    kind = KINDS[name]
    with Engine(0, folder) as engine:
        return engine.load("survey", store.get(kind.model), kind.arguments(store.get))
