"""kill -9 in `pull` while it writes: the next one removes what was left, and disturbs no pull that still runs."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from netloader.checkpoint.parts import Part, is_part, remove_left_parts
from netloader.cli import main
from netloader.errors import CheckpointError
from tests.cases.files import served, tensors

LEAVE = """
import os, signal, sys
from pathlib import Path
from netloader.checkpoint.parts import Part
part = Part(Path(sys.argv[1]) / "model.safetensors")
os.write(part.descriptor, bytes(1000))
os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def test_the_parts_of_a_killed_pull_are_removed_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    output.mkdir()
    killed = subprocess.run([sys.executable, "-c", LEAVE, str(output)], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    (left,) = names(output)
    assert is_part(left)
    with served(tensors("a", "b")) as address:
        assert main(["pull", address, "-o", str(output)]) == 0
    assert f"removed {output / left}: an earlier pull was killed and had left it" in capsys.readouterr().err
    assert names(output) == ["model.safetensors"]


def test_the_part_of_a_running_pull_stays(tmp_path: Path) -> None:
    part = Part(tmp_path / "model.safetensors")
    try:
        assert remove_left_parts(tmp_path) == []
        assert part.path.exists()
    finally:
        part.remove()
    assert names(tmp_path) == []


def test_a_part_that_others_remove_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = iter([False, False, True])
    monkeypatch.setattr(Part, "_locked", lambda _: next(taken))
    part = Part(tmp_path / "model.safetensors")
    assert names(tmp_path) == [part.path.name]
    part.remove()
    monkeypatch.setattr(Part, "_locked", lambda _: False)
    with pytest.raises(CheckpointError, match="its part is removed by others"):
        Part(tmp_path / "model.safetensors")
    assert names(tmp_path) == []
