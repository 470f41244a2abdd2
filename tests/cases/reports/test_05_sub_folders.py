"""Weights in sub-folders: served with their path if the index names them, else named with a hint that helps."""

from __future__ import annotations

from pathlib import Path

import pytest

from netloader.checkpoint import fingerprint_of, open_checkpoint
from netloader.errors import CheckpointError
from tests.cases.files import save, save_index, tensors


def test_folders_with_weights_beside_the_model_are_named(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", tensors("a"))
    save(tmp_path, "2_Dense/model.safetensors", tensors("linear.weight"))
    (tmp_path / "1_Pooling").mkdir()
    (line,) = open_checkpoint(tmp_path).left_out
    assert line.startswith("weights in the folders 2_Dense: ")


def test_a_folder_whose_weights_are_all_in_folders_names_them(tmp_path: Path) -> None:
    save(tmp_path, "transformer/diffusion_pytorch_model.safetensors", tensors("a"))
    save(tmp_path, "vae/diffusion_pytorch_model.safetensors", tensors("b"))
    with pytest.raises(CheckpointError, match="its folders transformer, vae have") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint == f"give one of them, such as {tmp_path / 'transformer'}"


def test_files_in_folders_that_the_index_names_are_used(tmp_path: Path) -> None:
    save(tmp_path, "parts/one.safetensors", tensors("a"))
    save(tmp_path, "parts/two.safetensors", tensors("b"))
    save_index(tmp_path, {"a": "parts/one.safetensors", "b": "parts/two.safetensors"})
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.left_out == ()
    assert fingerprint_of(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "a/../x.safetensors", "./x.safetensors", "x.bin"]
)
def test_an_index_that_leads_out_of_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", tensors("a"))
    save_index(tmp_path, {"a": name})
    with pytest.raises(CheckpointError, match="is not a safetensors file of this folder"):
        open_checkpoint(tmp_path)
