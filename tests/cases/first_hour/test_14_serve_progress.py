"""`serve` shows its own progress on standard error, with the right figures."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest

from netloader.cli import serve as command
from netloader.core.protocol import State
from netloader.errors import PeerLost
from netloader.observe import SessionEnded
from netloader.observe.events import PhaseEnded
from netloader.observe.logging import ServerLog
from tests.cases.files import save, tensors
from tests.commands import command as command_line


class EndOfTest(Exception):
    """The test has seen enough."""


def test_results_are_on_standard_output_and_progress_on_standard_error(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", tensors("a"))
    save(tmp_path, "adapter_model.safetensors", tensors("b"))
    arguments = command_line("serve", tmp_path, "--host", "127.0.0.1", "--stop-on-eof")
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        lines = list(itertools.islice(process.stdout or (), 2))
        rest, progress = process.communicate("", timeout=60)
    assert [line.split()[0] for line in [*lines, *rest.splitlines()]] == ["root", "serving", "stopped"]
    assert "hashed 512 B of 512 B (100%)" in progress
    assert "left out: adapter_model.safetensors: model.safetensors is the whole model" in progress


async def test_the_first_rate_counts_from_the_beginning_of_the_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 MB per second from second 10 on; looked at in second 12."""
    clock = SimpleNamespace(now=10.0)
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: clock.now))
    said: list[str] = []
    monkeypatch.setattr(command, "say", lambda text, **_: said.append(text))
    transfers = command._Transfers(5.0)
    transfers.note(PhaseEnded("server", 1, "10.0.0.9:1", "plan", 0.1))

    async def next_look(_: float) -> None:
        clock.now += 2.0
        if clock.now > 12.0:
            raise EndOfTest

    monkeypatch.setattr(anyio, "sleep", next_look)
    session = SimpleNamespace(peer="10.0.0.9:1", state=State.TRANSFER, nbytes=2_000_000)
    with pytest.raises(EndOfTest):
        await transfers.show(SimpleNamespace(sessions=[session]), 8_000_000)  # type: ignore[arg-type]
    assert said == ["10.0.0.9:1: sent 2.00 MB of 8.00 MB (25%), 1.00 MB/s, 0:06 left"]


def test_a_session_that_fails_while_blocks_are_sent_does_not_claim_that_none_were(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ServerLog()(
        SessionEnded("server", 1, "10.0.0.9:1", "target", "tcp", 1.0, 0, 0, error=PeerLost("it is gone"), unfinished=7)
    )
    assert "session 1 with 10.0.0.9:1, after 0 blocks and while sending 7 more: it is gone" in caplog.text
