"""Two pulls into one folder: the files of one of them are there in the end, and the other one says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from netloader import ModelIdentity
from netloader.checkpoint import OutputFolder, open_checkpoint
from netloader.errors import CheckpointError
from netloader.tensors import hold
from tests.cases.files import tensors


def fill(output: OutputFolder, content: dict[str, torch.Tensor]) -> None:
    manifest = hold(content, ModelIdentity()).announcement.manifest
    for name, tensor in output.allocate(manifest, None).items():
        tensor.copy_(content[name])
    output.sync(lambda *_: None)


def test_the_slower_of_two_pulls_does_not_replace_what_the_other_one_wrote(tmp_path: Path) -> None:
    first, second = tensors("a", seed=1), tensors("a", seed=2)
    with OutputFolder(tmp_path) as slow:
        fill(slow, second)
        with OutputFolder(tmp_path) as fast:
            assert fast.removed == []
            fill(fast, first)
            (file,) = fast.publish()
        with pytest.raises(CheckpointError, match="was written meanwhile"):
            slow.publish()
    assert list(tmp_path.iterdir()) == [file]
    assert torch.equal(open_checkpoint(tmp_path).tensors["a"], first["a"])
    with OutputFolder(tmp_path, overwrite=True) as again:
        fill(again, second)
        again.publish()
    assert torch.equal(open_checkpoint(tmp_path).tensors["a"], second["a"])
