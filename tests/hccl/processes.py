"""Processes of a scenario, as handles: start them, send requests, and end all of them."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.preloaded import PYTHON

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0


class Child:
    """One process with the device; see `tests.hccl.child`.

    Args:
        environment: The complete environment.
        arguments: Arguments of the child.
        module: What it runs: something that answers lines on its standard input with lines of JSON.
        python: The interpreter.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        *arguments: str,
        module: str = "tests.hccl.child",
        python: str = PYTHON,
    ) -> None:
        self.log: list[str] = []
        self._logged = threading.Condition()
        self._said: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.process = subprocess.Popen(
            [python, "-W", "ignore", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=dict(environment),
        )
        self._readers = [
            threading.Thread(target=self._read_said, name="child-stdout", daemon=True),
            threading.Thread(target=self._read_log, name="child-stderr", daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_said(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self._said.put(json.loads(line))
            else:
                self._note(line)
        self._said.put(None)

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._note(line)

    def _note(self, line: str) -> None:
        with self._logged:
            self.log.append(line)
            self._logged.notify_all()

    def logs(self, *parts: str, patience: float = PATIENCE) -> str:
        """The first line that it logs with all of `parts` in it, within `patience` seconds."""

        def found() -> str:
            return next((line for line in self.log if all(part in line for part in parts)), "")

        with self._logged:
            line = self._logged.wait_for(found, patience)
        if not line:
            raise AssertionError(f"it did not log {parts}:\n{self.text()}")
        return line

    def heard(self, patience: float = PATIENCE) -> dict[str, Any]:
        """The next line of its output, decoded, within `timeout` seconds."""
        said = self._said.get(timeout=patience)
        if said is None:
            raise AssertionError(f"it ended with {self.process.wait()}:\n{self.text()}")
        return said

    def ask(self, what: str, patience: float = PATIENCE) -> dict[str, Any]:
        """Send it a line and return its answer."""
        self.tell(what)
        return self.heard(patience)

    def tell(self, what: str) -> None:
        """Send it a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()

    def ended(self) -> int:
        """Its exit status, once it has ended."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        status = self.process.wait(PATIENCE)
        for reader in self._readers:
            reader.join(PATIENCE)
        return status

    def kill(self) -> None:
        """Kill it (SIGKILL), as when its host is lost."""
        self.process.send_signal(signal.SIGKILL)

    def text(self) -> str:
        """The end of what it logged."""
        return "".join(self.log[-80:])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join(PATIENCE)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue


@contextmanager
def seed(environment: Mapping[str, str], device: str = "npu:2", **options: Any) -> Iterator[tuple[Child, str]]:
    """A process that serves; returns it and its port."""
    with Child(environment, "serve", f"--device={device}", *_flags(options)) as child:
        yield child, str(child.heard()["port"])


def receiver(environment: Mapping[str, str], port: str, device: str = "npu:0", **options: Any) -> Child:
    """A process that pulls."""
    return Child(environment, "pull", f"--device={device}", f"--port={port}", *_flags(options))


def _flags(options: Mapping[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def clean_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without anything that changes HCCL, and with `extra`."""
    hidden = ("HCCL_", "P2P_HCCL_", "TORCH_HCCL_", "RANK_TABLE_FILE", "ROOTINFO_", "ASCEND_RT_", "STAND_IN_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return kept | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"} | dict(extra)
