"""A second copy of the weights, or an adapter, beside the model: one rule, for serving and for fingerprints."""

from __future__ import annotations

from pathlib import Path

import pytest

from netloader.checkpoint import fingerprint_of, open_checkpoint
from netloader.checkpoint.fingerprint import weight_files_of
from tests.cases.files import save, save_index, tensors

MODEL = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
COPY = "consolidated.safetensors"


@pytest.mark.parametrize(
    ("files", "indexed", "used", "reason"),
    [
        ([MODEL, ADAPTER, COPY], False, [MODEL], f"{MODEL} is the whole model"),
        ([MODEL, "b.safetensors"], True, ["b.safetensors"], "model.safetensors.index.json does not name it"),
        (["a.safetensors", "b.safetensors", ADAPTER], False, ["a.safetensors", "b.safetensors"], "it is an adapter"),
        (["a.safetensors", COPY], False, ["a.safetensors"], "a copy in another form"),
        ([COPY], False, [COPY], ""),
        ([ADAPTER], False, [ADAPTER], ""),
    ],
)
def test_the_files_of_the_model_are_the_same_everywhere_and_the_others_are_named(
    files: list[str], indexed: bool, used: list[str], reason: str, tmp_path: Path
) -> None:
    for name in files:
        save(tmp_path, name, tensors(f"in.{name}"))
    if indexed:
        save_index(tmp_path, {f"in.{name}": name for name in used})
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.weight_files) == used
    assert [file.name for file in weight_files_of(tmp_path)] == used
    assert list(checkpoint.tensors) == [f"in.{name}" for name in used]
    left = [name for name in sorted(files) if name not in used]
    assert len(checkpoint.left_out) == (1 if left else 0)
    if left:
        assert checkpoint.left_out[0].startswith(", ".join(left))
        assert reason in checkpoint.left_out[0]
    before = fingerprint_of(tmp_path)
    for name in left:
        (tmp_path / name).unlink()
    assert fingerprint_of(tmp_path) == before
