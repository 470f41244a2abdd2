"""`pull` into a file system that is too small: found before the transfer, with one exit status."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from netloader import sync
from netloader.cli import main
from netloader.observe import SessionEnded
from netloader.observe.events import Event
from tests.cases.files import IDENTITY, tensors


@pytest.mark.parametrize("as_json", [True, False])
def test_too_little_space_is_found_before_a_block_is_sent(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[SessionEnded] = []

    def note(event: Event) -> None:
        if isinstance(event, SessionEnded):
            ended.append(event)

    output = tmp_path / "new" / "out"
    with sync.serve(tensors("a", "b"), IDENTITY, host="127.0.0.1", transport="tcp", observers=[note]) as server:
        monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=512))
        status = main(["pull", str(server.address), "-o", str(output), *["--json"] * as_json])
    said = capsys.readouterr()
    assert status == 1
    needed = f"{output} needs "
    if as_json:
        found = json.loads(said.out)
        assert (found["ok"], found["exit"], found["error"]) == (False, 1, "CheckpointError")
        assert found["message"].startswith(needed)
    assert f"netloader: error: {needed}" in said.err
    assert "its file system has 512 free" in said.err
    assert "no source" not in said.err
    assert [event.blocks for event in ended] == [0]
    assert not (tmp_path / "new").exists()
