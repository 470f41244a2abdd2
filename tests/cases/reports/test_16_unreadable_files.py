"""Files that can't be read or mapped: permission, file system and memory are each named."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest
import safetensors

from netloader.checkpoint import open_checkpoint
from netloader.errors import CheckpointError
from tests.cases.files import save, tensors


def failing_with(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The system refuses to open (EACCES) or to map a file, as libraries see it: hidden in a text."""

    def refuse(*_: object, **__: object) -> object:
        raise OSError(number, os.strerror(number))

    def opaque(*_: object, **__: object) -> object:
        raise safetensors.SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})")

    monkeypatch.setattr(safetensors, "safe_open", opaque)
    if number == errno.EACCES:
        monkeypatch.setattr(os, "open", refuse)
    else:
        monkeypatch.setattr(mmap, "mmap", refuse)


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.EACCES, "run as a user that may read it"),
        (errno.ENODEV, "its file system cannot map files"),
        (errno.ENOMEM, "too little memory or address space"),
        (errno.EIO, "the disk or the file server reports an error"),
    ],
)
def test_the_cause_is_named_and_the_hint_can_help(
    number: int, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save(tmp_path, "model.safetensors", tensors("a"))
    with monkeypatch.context() as patch:
        failing_with(patch, number)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path)
    assert caught.value.message == f"{file} cannot be read: {os.strerror(number)}"
    assert hint in caught.value.hint
    assert "fetch" not in caught.value.hint


def test_no_memory_is_no_fault_of_netloader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object, **__: object) -> object:
        raise MemoryError

    save(tmp_path, "model.safetensors", tensors("a"))
    monkeypatch.setattr(safetensors, "safe_open", none_left)
    with pytest.raises(CheckpointError, match="no memory is left"):
        open_checkpoint(tmp_path)


def test_a_damaged_file_is_fetched_again(tmp_path: Path) -> None:
    file = save(tmp_path, "model.safetensors", tensors("a"))
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="is no complete safetensors file") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint == "fetch the checkpoint again"
