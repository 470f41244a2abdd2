"""A scenario with several engines: their folders, and engines whose servers hold in the middle of a transfer."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e import clients, engines
from tests.e2e.engines import Engine, wait_for
from tests.e2e.hosts import ASLEEP, MODEL
from tests.support import with_plugins

HELD_AFTER = 2
"""Number of the block after which a server of :meth:`Scenario.held` holds."""

HELD: dict[str, Any] = {"TRANSPORT": ["held", "tcp"], "STALL_TIMEOUT": clients.STALL_TIMEOUT}
"""Settings of an engine whose transfers may be held: a stall time that is longer than a hold."""


def environment_with_plugins(**more: str) -> dict[str, str]:
    """The environment for an engine that uses the test transports, and logs what each source gave."""
    return with_plugins(
        {**ASLEEP, "VLLM_LOGGING_LEVEL": "DEBUG", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}, **more
    )


@dataclass
class Scenario:
    """The engines of a scenario; its tests add to it one after the other."""

    stack: ExitStack
    folder: Path
    full: Path
    bare: Path
    quiet: list[float] = field(default_factory=list)
    seed: Engine | None = None
    answers: Any = None

    def start(self, name: str, host: Path, *arguments: str, **settings: Any) -> Engine:
        """Start an engine in the folder `host`; every engine has the same relative path to the model."""
        log = self.folder / f"{name}.log"
        return self.stack.enter_context(engines.engine(MODEL, log, *arguments, folder=host, **settings))

    def held(self, name: str, *sources: str, files: bool = False, **settings: Any) -> Engine:
        """Start an engine whose server holds in the middle of each transfer over `held`."""
        environment = environment_with_plugins(
            NETLOADER_TEST_HOLD=str(HELD_AFTER),
            NETLOADER_TEST_FILE=str(self.folder / f"{name}-goes-on"),
            NETLOADER_TEST_MARKS=str(self.marks(name)),
        )
        config = {
            **clients.source(*sources),
            **HELD,
            "OUTPUT_PREFIX": str(self.folder / f"{name}-rank"),
            **settings,
        }
        return self.start(name, self.full if files else self.bare, environment=environment, config=config, niceness=2)

    def marks(self, name: str) -> Path:
        """The folder in which each held transfer of an engine's server creates a file."""
        folder = self.folder / f"{name}-marks"
        folder.mkdir(exist_ok=True)
        return folder

    def wait_held(self, name: str, count: int) -> None:
        """Wait until `count` transfers are held."""
        folder = self.marks(name)
        wait_for(
            lambda: len(list(folder.iterdir())) >= count, engines.READY_TIMEOUT, f"{count} transfers in the middle"
        )
