"""Running the command line: in separate processes, and inside the process of the test."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.preloaded import PYTHON, PYTHON_THAT_STARTS_OTHERS

PATIENCE = 60.0
"""Seconds: a limit for what is expected to happen, however busy the machine."""


def command(*arguments: object) -> list[str]:
    python = PYTHON_THAT_STARTS_OTHERS if "demo" in arguments else PYTHON
    return [python, "-m", "netloader", *map(str, arguments)]


def run(*arguments: object, cwd: Path | None = None, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """A command from beginning to end, in a process that has torch loaded, or in a `fresh` one."""
    whole = command(*arguments)
    if fresh:
        whole[0] = sys.executable
    return subprocess.run(whole, check=False, capture_output=True, text=True, timeout=PATIENCE * 1.5, cwd=cwd)


class Serving:
    """A ``netloader serve`` that has printed its address."""

    def __init__(self, process: subprocess.Popen[str], lines: list[str], address: str) -> None:
        self.process = process
        self.lines = lines
        self.address = address

    def read_to_end(self) -> str:
        """Wait for its end; return all of its output."""
        rest, _ = self.process.communicate(timeout=PATIENCE)
        return "".join(self.lines) + rest


@contextmanager
def serving(*arguments: object, host: str = "127.0.0.1", within: Sequence[str] = ()) -> Iterator[Serving]:
    """A server; `within` another command, such as one that limits it, in a fresh process."""
    whole = command("serve", *arguments, "--host", host)
    if within:
        whole[0] = sys.executable
    process = subprocess.Popen(
        [*within, *whole],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        lines: list[str] = []
        for line in process.stdout or ():
            lines.append(line)
            found = re.fullmatch(r"serving .* at (\S+:\d+)\n", line)
            if found is not None:
                yield Serving(process, lines, found[1])
                break
        else:
            raise AssertionError(f"the server ended with {process.wait(PATIENCE)}: {''.join(lines)}")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=PATIENCE)


@contextmanager
def untouched_logging() -> Iterator[None]:
    """The command line configures the log of its process; restore it after a test that calls it in its own process."""
    log = logging.getLogger("netloader")
    before = log.handlers[:], log.level, log.propagate
    try:
        yield
    finally:
        log.handlers[:], log.level, log.propagate = before


def no_traceback(text: str) -> bool:
    return "Traceback" not in text and f"{os.sep}netloader{os.sep}" not in text
