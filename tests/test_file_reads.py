"""What a model reads from files while it is built, and whether the weights contain it: without vLLM."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from netloader.vllm.load.file_reads import FileReads, Traced

VALUES = {"weight": torch.arange(12.0).reshape(3, 4) / 7, "bias": torch.arange(3.0) + 5}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A weight file with two tensors."""
    found = tmp_path / "dense.safetensors"
    safetensors.torch.save_file(VALUES, found)
    return found


@pytest.fixture
def late() -> Iterator[ModuleType]:
    """A module that imports names from safetensors on demand."""
    module = ModuleType("tests_module_imported_late")
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def linear(read: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    made = torch.nn.Linear(4, 3, dtype=dtype)
    made.load_state_dict(read)
    return {f"projector.{name}": tensor for name, tensor in made.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_became_a_weight_are_found_in_any_floating_type(path: Path, dtype: torch.dtype) -> None:
    with FileReads() as reads:
        weights = linear(safetensors.torch.load_file(path), dtype)
    others = {"up.weight": torch.zeros(3, 4), "up.bias": torch.zeros(3)}
    assert reads.traced({**others, **weights}) == Traced(frozenset(weights))


def test_values_that_became_no_weight_are_named(path: Path) -> None:
    with FileReads() as reads:
        weights = linear(safetensors.torch.load_file(path))
    del weights["projector.bias"]
    assert reads.traced(weights).lost == (f"{path}: bias",)
    weights["projector.weight"].mul_(2)
    assert set(reads.traced(weights).lost) == {f"{path}: weight", f"{path}: bias"}


def test_values_that_are_a_weight_and_kept_elsewhere_too_are_named(path: Path) -> None:
    with FileReads() as reads:
        read = safetensors.torch.load(path.read_bytes())
        weights = linear(read)
    assert set(reads.traced(weights).lost) == {"weight", "bias"}
    assert reads.traced(read).lost == (), "the tensors that were read may be the weights themselves"
    read.clear()
    assert reads.traced(weights).lost == ()


def test_values_that_cannot_be_inspected_are_named(path: Path) -> None:
    with FileReads() as reads, safetensors.safe_open(path, framework="numpy") as file:
        assert file.get_tensor("bias").tolist() == VALUES["bias"].tolist()
    assert reads.traced(VALUES).lost == (f"{path}: bias (ndarray)",)


def test_reading_shapes_and_dtypes_only_does_not_count(path: Path) -> None:
    with FileReads() as reads, safetensors.safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["bias", "weight"]
        assert file.metadata() is None
        assert file.get_slice("weight").get_shape() == [3, 4]
    assert reads.traced({}) == Traced()


def test_a_slice_is_found_where_a_weight_is_that_slice(path: Path) -> None:
    with FileReads() as reads, safetensors.safe_open(path, framework="pt") as file:
        shard = file.get_slice("weight")[1:].clone()
    assert reads.traced({"shard": shard}) == Traced(frozenset({"shard"}))
    assert reads.traced({"weight": VALUES["weight"]}).lost == (f"{path}: weight",)


def test_values_read_by_torch_load_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "dense.pt"
    torch.save({"state": [VALUES], "epoch": 3}, path)
    with FileReads() as reads:
        found: Any = torch.load(path, weights_only=True)
        weights = {f"projector.{name}": tensor.clone() for name, tensor in found["state"][0].items()}
    del found
    assert reads.traced(weights) == Traced(frozenset(weights))
    del weights["projector.weight"]
    assert reads.traced(weights).lost == (f"{path}: state: 0: weight",)


def test_every_patched_module_is_restored(path: Path, late: Any) -> None:
    originals = safetensors.safe_open, safetensors.torch.load, torch.load
    late.early = safetensors.safe_open
    with FileReads() as reads:
        assert late.early is not originals[0]
        late.opened, late.load = safetensors.safe_open, torch.load
        watched = safetensors.torch.load
    assert (safetensors.safe_open, safetensors.torch.load, torch.load) == originals
    assert (late.early, late.opened, late.load) == (originals[0], originals[0], originals[2])
    assert watched(path.read_bytes()).keys() == VALUES.keys()
    assert reads.traced({}) == Traced(), "what is read afterwards is not noted, however it was reached"


# --- files that are read in another way -------------------------------------------------------------------------------

OTHERWISE = "(read by other means than safetensors and torch.load)"


def by_numpy(file: Path) -> object:
    return np.load(file)


def by_fromfile(file: Path) -> object:
    return np.fromfile(str(file), dtype=np.uint8)


def by_memmap(file: Path) -> object:
    return np.memmap(file, dtype=np.uint8)


def by_open(file: Path) -> object:
    with file.open("rb") as opened:
        return opened.read()


def by_descriptor(file: Path) -> object:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return os.read(descriptor, 8)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("name", ["prior.npy", "prior.bin", "deep/prior.dat", "prior"])
@pytest.mark.parametrize("read", [by_numpy, by_fromfile, by_memmap, by_open, by_descriptor])
def test_a_file_of_the_model_that_is_read_in_any_other_way_is_named(read: Any, name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    with file.open("wb") as opened:
        np.save(opened, np.arange(8.0))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with FileReads(tmp_path) as reads:
        read(file)
    assert reads.traced({}).lost == (f"{file} {OTHERWISE}",)
    read(file)
    assert reads.traced({}).lost == (f"{file} {OTHERWISE}",), "after the end nothing is recorded"


def test_a_file_of_a_snapshot_is_named_also_if_its_blob_is_opened(tmp_path: Path) -> None:
    blob, snapshot = tmp_path / "blobs" / "0123", tmp_path / "snapshots" / "abc"
    blob.parent.mkdir()
    snapshot.mkdir(parents=True)
    blob.write_bytes(b"values")
    (snapshot / "prior.npy").symlink_to(blob)
    with FileReads(snapshot) as reads:
        blob.read_bytes()
    assert reads.traced({}).lost == (f"{snapshot / 'prior.npy'} {OTHERWISE}",)


def test_a_tensor_file_elsewhere_is_named_and_another_file_elsewhere_is_not(tmp_path: Path) -> None:
    for name in ("prior.npy", "compiled.bin", "settings.json"):
        (tmp_path / name).write_bytes(b"x")
    with FileReads(None) as reads:
        for file in tmp_path.iterdir():
            file.read_bytes()
    assert reads.traced({}).lost == (f"{tmp_path / 'prior.npy'} {OTHERWISE}",)


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.model", "source.spm", "merges.txt", "modeling.py", "cache.cu", "chat_template.jinja"],
)
def test_configuration_vocabulary_and_code_hold_no_weights(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with FileReads(tmp_path) as reads:
        (tmp_path / name).read_bytes()
    assert reads.traced({}) == Traced()


def test_a_file_that_is_only_written_is_no_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    file = tmp_path / "trace.log"
    with FileReads(tmp_path) as reads:
        file.write_text("built")
        os.close(os.open(tmp_path / "by-descriptor.log", os.O_WRONLY | os.O_CREAT))
    assert reads.traced({}) == Traced()
    with FileReads(tmp_path) as reads:
        file.write_text("built")
        file.read_text()
    assert reads.traced({}).lost == (f"{file} {OTHERWISE}",)
    with FileReads(tmp_path) as reads, file.open("r+b"):
        pass
    assert reads.traced({}).lost == (f"{file} {OTHERWISE}",)


def test_all_recordings_share_one_audit_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hook makes every call slower that raises an audit event, and Python can't remove one."""
    added: list[object] = []
    with FileReads(tmp_path):
        pass
    monkeypatch.setattr(sys, "addaudithook", added.append)
    (tmp_path / "one.npy").write_bytes(b"1")
    (tmp_path / "two.npy").write_bytes(b"2")
    with FileReads(tmp_path) as outer:
        (tmp_path / "one.npy").read_bytes()
        with FileReads(tmp_path) as inner:
            (tmp_path / "two.npy").read_bytes()
        inner.stop()
        (tmp_path / "one.npy").read_bytes()
    assert added == []
    assert inner.traced({}).lost == (f"{tmp_path / 'two.npy'} {OTHERWISE}",)
    assert outer.traced({}).lost == tuple(f"{tmp_path / name}.npy {OTHERWISE}" for name in ("one", "two"))


def test_the_checkpoint_itself_may_be_looked_into(tmp_path: Path) -> None:
    """vLLM reads headers of weight files while it builds a model. The fingerprint covers their contents."""
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(VALUES, file)
    with FileReads(tmp_path) as reads:
        file.read_bytes()
    assert reads.traced({}) == Traced()


@pytest.mark.parametrize("form", ["path", "bytes", "buffer", "file"])
def test_contents_that_were_seen_as_tensors_are_no_other_read(form: str, tmp_path: Path) -> None:
    file = tmp_path / "dense.pt"
    torch.save(VALUES, file)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with FileReads(tmp_path) as reads:
        if form == "path":
            made = linear(torch.load(file))
        elif form == "file":
            with file.open("rb") as opened:
                made = linear(torch.load(opened))
        elif form == "buffer":
            made = linear(torch.load(io.BytesIO(file.read_bytes())))
        else:
            safetensors.torch.save_file(VALUES, file)
            made = linear(safetensors.torch.load(file.read_bytes()))
    assert reads.traced(made).lost == ()


def test_one_read_explains_one_file(tmp_path: Path) -> None:
    file, twin = tmp_path / "dense.pt", tmp_path / "twin.pt"
    torch.save(VALUES, file)
    twin.write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"")
    with FileReads(tmp_path) as reads:
        made = linear(torch.load(io.BytesIO(file.read_bytes())))
        twin.read_bytes()
    assert reads.traced(made).lost == (f"{twin} {OTHERWISE}",)
