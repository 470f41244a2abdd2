"""Outputs that can't be written are found before the transfer, with exit status 1."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from netloader.checkpoint import OutputFolder
from netloader.cli import main
from netloader.errors import CheckpointError
from tests.cases.files import served, tensors


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.EROFS, "the file system is read-only"), (errno.EACCES, "run as a user that may write there")],
)
def test_a_folder_that_cannot_be_written_is_found_before_any_source_is_asked(
    number: int,
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["pull", "127.0.0.1:1", "-o", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'out'} cannot be written: {os.strerror(number)}" in said
    assert hint in said
    assert "127.0.0.1:1" not in said


def test_parents_that_are_missing_are_made_and_removed_again_after_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", "127.0.0.1:1", "-o", str(tmp_path / "a" / "b" / "c")]) == 1
    assert list(tmp_path.iterdir()) == []
    with served(tensors("a")) as address:
        assert main(["pull", address, "-o", str(tmp_path / "a" / "b" / "c")]) == 0
    assert [file.name for file in (tmp_path / "a" / "b" / "c").iterdir()] == ["model.safetensors"]
    capsys.readouterr()


def test_space_that_cannot_be_reserved_is_an_error_before_the_transfer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    from netloader.core.identity import ModelIdentity
    from netloader.tensors import hold

    manifest = hold(tensors("a"), ModelIdentity()).announcement.manifest
    monkeypatch.setattr(os, "posix_fallocate", full)
    with OutputFolder(tmp_path / "out") as output:
        with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be written: No space left") as caught:
            output.allocate(manifest, None)
        assert output.error is caught.value
    assert list(tmp_path.iterdir()) == []
