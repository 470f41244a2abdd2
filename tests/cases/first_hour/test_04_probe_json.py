"""`probe --json`, and nobody there."""

from __future__ import annotations

import json

import pytest

from netloader.cli import main


def test_a_probe_that_fails_prints_one_object_with_its_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "127.0.0.1:1", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["exit"], said["error"]) == (False, 1, "PeerLost")
    assert "127.0.0.1:1 cannot be reached" in said["message"]
