"""Metadata whose value happens to be the name of a tensor is no tied tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from netloader.checkpoint import open_checkpoint, write_checkpoint
from netloader.checkpoint.metadata import ALIASES
from netloader.errors import CheckpointError
from tests.cases.files import metadata_of, save, tensors


@pytest.mark.parametrize("key", ["base", "base.model", "x", "a.base"])
def test_a_text_that_is_the_name_of_a_tensor_stays_a_text(key: str, tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", tensors("w", "v.w"), {key: "w", "format": "v.w"})
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["v.w", "w"]
    assert checkpoint.metadata == {key: "w", "format": "v.w"}


@pytest.mark.parametrize(
    ("alias", "owner"), [("lm_head.weight", "model.embed.weight"), ("attn.k_scale", "attn.v_scale")]
)
def test_tied_tensors_of_older_files_are_found(alias: str, owner: str, tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", tensors(owner), {"format": "pt", alias: owner})
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == [owner, alias]
    assert checkpoint.metadata == {"format": "pt"}


@pytest.mark.parametrize("alias", ["format", "anything", "model.other"])
def test_any_name_of_a_tied_tensor_survives(alias: str, tmp_path: Path) -> None:
    content = tensors("w")
    (file,) = write_checkpoint({**content, alias: content["w"]}, tmp_path, metadata={"format": "mlx", "base": "w"})
    checkpoint = open_checkpoint(tmp_path)
    assert sorted(checkpoint.tensors) == sorted(["w", alias])
    assert checkpoint.tensors[alias] is checkpoint.tensors["w"]
    assert checkpoint.metadata == {"format": "mlx", "base": "w"}
    assert metadata_of(file)["format"] == "mlx"


@pytest.mark.parametrize("text", ["{", "[]", '{"b": 1}', '{"b": "not there"}'])
def test_names_of_tied_tensors_that_cannot_be_read_are_an_error_that_names_the_file(text: str, tmp_path: Path) -> None:
    file = save(tmp_path, "model.safetensors", {"w": torch.ones(2)}, {ALIASES: text})
    with pytest.raises(CheckpointError, match=str(file)):
        open_checkpoint(tmp_path)
