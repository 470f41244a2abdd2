"""`pull` says what it takes in all, and writing is part of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from netloader.cli import main
from tests.cases.files import served, tensors


def test_writing_is_shown_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(tensors("a", "b")) as address:
        assert main(["pull", address, "-o", str(tmp_path / "text")]) == 0
        said = capsys.readouterr()
        assert main(["pull", address, "-o", str(tmp_path / "json"), "--json"]) == 0
    size = (tmp_path / "text" / "model.safetensors").stat().st_size / 1000
    assert re.search(rf"written {size:.2f} kB of {size:.2f} kB \(100%\)", said.err)
    assert re.search(r"wrote 1 file \(.* kB\) to .*: [\d.]+ s after the last block, [\d.]+ s in all\n", said.out)
    found = json.loads(capsys.readouterr().out)
    assert found["total_seconds"] >= found["seconds"] + found["write_seconds"]
