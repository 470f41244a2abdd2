"""Published checkpoints that are odd: the index decides, and what is ignored is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from netloader.checkpoint import open_checkpoint
from netloader.errors import CheckpointError
from tests.cases.files import save, save_index, tensors

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_a_duplicate_in_the_next_file_does_not_count(tmp_path: Path) -> None:
    right = tensors("a")
    save(tmp_path, ONE, right)
    save(tmp_path, TWO, {**tensors("b"), **tensors("a", seed=9)})
    save_index(tmp_path, {"a": ONE, "b": TWO})
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(checkpoint.tensors["a"], right["a"])
    assert checkpoint.left_out == (f"tensors a of {TWO}: model.safetensors.index.json places them in {ONE}",)


def test_a_tensor_that_the_index_does_not_know_does_not_count(tmp_path: Path) -> None:
    save(tmp_path, ONE, tensors("a", "extra"))
    save_index(tmp_path, {"a": ONE})
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["a"]
    assert checkpoint.left_out == (f"tensors extra of {ONE}: model.safetensors.index.json does not name them",)


def test_overlay_files_that_the_index_names_win_over_those_that_it_does_not(tmp_path: Path) -> None:
    right = tensors("a", seed=3)
    save(tmp_path, ONE, tensors("a"))
    save(tmp_path, "overlay.safetensors", right)
    save_index(tmp_path, {"a": "overlay.safetensors"})
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(checkpoint.tensors["a"], right["a"])
    assert checkpoint.left_out == (f"{ONE}: model.safetensors.index.json does not name it",)


def test_a_file_that_is_missing_has_a_remedy_that_exists(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", tensors("a"))
    save_index(tmp_path, {"a": ONE})
    with pytest.raises(CheckpointError, match=f"{ONE} is missing") as caught:
        open_checkpoint(tmp_path)
    assert "remove the index if model.safetensors is the whole model" in caught.value.hint
