"""Processes of two releases: the tree of an earlier state out of the history, and agents that run either."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.preloaded import PYTHON

ROOT = Path(__file__).parents[2]
PREVIOUS = "b5e5901"
"""The last state that speaks the protocol before the one that is spoken now, or the same one for the first time."""

_TEXT = (Path(__file__).parent / "agent.py").read_text(encoding="utf-8")


def unpack_previous(into: Path) -> Path:
    """Put the package of `PREVIOUS` into a folder; returns the folder that has to be on the path.

    Skips the test where there is no history at all: an unpacked source distribution. A history without that state fails
    it.
    """
    if not (ROOT / ".git").exists():
        pytest.skip("this tree comes without its history (.git), which has the release before")
    # Git reads another user's checkout only when it is told to: a container that mounts one is no reason to fail.
    archive = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "archive", "--format=tar", PREVIOUS, "netloader"]
    made = subprocess.run(archive, check=False, capture_output=True, timeout=60)
    if made.returncode:
        pytest.fail(
            f"the history has no {PREVIOUS}, which these tests pull from and to (a shallow clone? "
            f"`git fetch --unshallow`): {made.stderr.decode()}",
            pytrace=False,
        )
    with tarfile.open(fileobj=io.BytesIO(made.stdout)) as files:
        files.extractall(into, filter="data")
    return into


class Agent:
    """A process that runs :mod:`tests.compat.agent` with the netloader of one tree."""

    def __init__(self, tree: Path, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.greeting = self._hear()
        if Path(self.greeting["file"]).resolve() != (tree / "netloader" / "__init__.py").resolve():
            raise AssertionError(f"the process that was to run the netloader of {tree} runs {self.greeting['file']}")

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Give a command, and wait for its answer."""
        if self.process.stdin is None:
            raise RuntimeError("the process has no pipes")
        self.process.stdin.write(json.dumps([command, arguments]) + "\n")
        self.process.stdin.flush()
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        if self.process.stdout is None:
            raise RuntimeError("the process has no pipes")
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"the process ended with {self.process.wait()}: see its standard error")
        heard: dict[str, Any] = json.loads(line)
        return heard

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def agent(tree: Path) -> Iterator[Agent]:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    process = subprocess.Popen(
        [PYTHON, "-c", _TEXT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tree,
        env=environment,
    )
    try:
        yield Agent(tree, process)
    finally:
        process.kill()
        process.communicate()


@dataclass
class Release:
    """One release, and the processes that run it: made when they are first asked for, kept for the tests to come.

    Attributes:
        name: For people.
        tree: Where its package lies.
    """

    name: str
    tree: Path
    stack: ExitStack
    _agents: dict[str, Agent] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def agent(self, name: str) -> Agent:
        """One of its processes."""
        if name not in self._agents:
            self._agents[name] = self.stack.enter_context(agent(self.tree))
        return self._agents[name]

    def stop(self) -> None:
        """Stop all that its processes serve."""
        for one in self._agents.values():
            one.ask("stop")
