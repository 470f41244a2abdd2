"""Ctrl-C in `pull` while it writes to the disk: one result, said aloud."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netloader.checkpoint import OutputFolder
from netloader.cli import main
from tests.cases.files import served, tensors

PATIENCE = 60.0


@pytest.fixture(autouse=True)
def _hangs_up() -> Iterator[None]:
    """Under nohup SIGHUP is ignored, and the command leaves it so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def interrupt_while_writing(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """The signal comes in the middle of the writing, which goes on until it is told to stop."""

    def sync(_: OutputFolder, progress: Callable[[int, int], None]) -> None:
        os.kill(os.getpid(), number)
        never = threading.Event()
        while not never.wait(0.01):
            progress(0, 1)

    monkeypatch.setattr(OutputFolder, "sync", sync)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_files_are_written_leaves_nothing_and_says_so(
    number: signal.Signals,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt_while_writing(monkeypatch, number)
    output = tmp_path / "out"
    with served(tensors("a", "b")) as address:
        assert main(["pull", address, "-o", str(output)]) == status
    said = capsys.readouterr()
    assert f"netloader: error: ended by {number.name}: nothing was left in {output}" in said.err
    assert "verified" not in said.out
    assert not output.exists()


def test_after_an_interrupted_pull_the_same_command_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(tensors("a", "b")) as address:
        with monkeypatch.context() as patch:
            interrupt_while_writing(patch, signal.SIGINT)
            assert main(["pull", address, "-o", str(tmp_path / "out")]) == 130
        assert main(["pull", address, "-o", str(tmp_path / "out")]) == 0
    assert "verified: all tensors bit-exact" in capsys.readouterr().out
