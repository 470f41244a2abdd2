"""An address file on a full disk: no draft stays, and the error names the file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from netloader.cli import main
from netloader.discovery.address_file import AddressFile, AddressFileError
from tests.cases.files import save, tensors


def test_nothing_stays_of_an_address_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AddressFileError, match=f"cannot write the address file {tmp_path / 'address'}: No space left"):
        AddressFile(tmp_path / "address", hint="").write("10.0.0.7:1")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_found_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, "model.safetensors", tensors("a"))
    file = tmp_path / "none" / "address"
    assert main(["serve", str(tmp_path), "--host", "127.0.0.1", "--address-file", str(file)]) == 1
    said = capsys.readouterr().err
    assert f"cannot write the address file {file}" in said
    assert "--address-file must name a file in a folder that exists" in said
    assert "hashed" not in said
