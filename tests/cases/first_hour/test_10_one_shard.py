"""One shard file given as MODEL_DIR."""

from __future__ import annotations

from pathlib import Path

import pytest

from netloader.checkpoint import open_checkpoint
from netloader.cli import main
from tests.cases.files import save, save_index, tensors


@pytest.mark.parametrize("indexed", [True, False])
def test_one_shard_of_several_is_refused_with_its_folder(
    indexed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = save(tmp_path, "model-00001-of-00002.safetensors", tensors("a"))
    save(tmp_path, "model-00002-of-00002.safetensors", tensors("b"))
    if indexed:
        save_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    assert main(["serve", str(shard), "--host", "127.0.0.1"]) == 2
    said = capsys.readouterr().err
    assert "one of 2 files" in said
    assert f"netloader: hint: give the folder: {tmp_path}" in said


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors", "other.safetensors"])
def test_one_file_that_is_no_shard_is_a_checkpoint(name: str, tmp_path: Path) -> None:
    save(tmp_path, "more.safetensors", tensors("b"))
    assert list(open_checkpoint(save(tmp_path, name, tensors("a"))).tensors) == ["a"]
