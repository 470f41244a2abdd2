"""Fingerprints: they differ for checkpoints whose files are equal by name, size and header only."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from netloader.checkpoint import fingerprint, fingerprint_of, open_checkpoint, write_checkpoint
from netloader.checkpoint.fingerprint import SAMPLE_BYTES, SAMPLES, weight_files_of

NAMES = [f"model.layers.{number}.weight" for number in range(40)]


def write(folder: Path, *, changed: str = "", shards: int = 2) -> Path:
    """A checkpoint of some files with an index; the tensor `changed` has other contents."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(7)
    tensors = {name: torch.randn(64, 48, generator=generator) for name in NAMES}
    if changed:
        tensors[changed] = tensors[changed].flip(0).contiguous()
    placed = {name: f"model-{number % shards + 1:05d}-of-{shards:05d}.safetensors" for number, name in enumerate(NAMES)}
    for file in set(placed.values()):
        save_file({name: tensors[name] for name in NAMES if placed[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


def test_equal_files_have_equal_fingerprints_wherever_and_whenever(tmp_path: Path) -> None:
    first = write(tmp_path / "a")
    copy = shutil.copytree(first, tmp_path / "b")
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    assert len(fingerprint_of(first)) == 32
    assert fingerprint_of(copy) == fingerprint_of(first)


@pytest.mark.parametrize("name", [NAMES[0], NAMES[17], NAMES[-1]])
def test_one_changed_tensor_changes_the_fingerprint(name: str, tmp_path: Path) -> None:
    usual, other = write(tmp_path / "a"), write(tmp_path / "b", changed=name)
    sizes = [sorted((file.name, file.stat().st_size) for file in folder.iterdir()) for folder in (usual, other)]
    assert sizes[0] == sizes[1], "nothing but contents tells them apart"
    assert fingerprint_of(usual) != fingerprint_of(other)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".gguf"])
def test_files_of_other_kinds_are_sampled_too(suffix: str, tmp_path: Path) -> None:
    contents = bytearray(os.urandom(3 << 20))
    made = []
    for at in (None, 0, len(contents) - 1):
        folder = tmp_path / str(at)
        folder.mkdir()
        data = bytearray(contents)
        if at is not None:
            start = max(0, at - SAMPLES * SAMPLE_BYTES)
            data[start : at + SAMPLES * SAMPLE_BYTES] = bytes(len(data[start : at + SAMPLES * SAMPLE_BYTES]))
        (folder / f"pytorch_model{suffix}").write_bytes(data)
        (folder / "training_args.bin").write_bytes(os.urandom(8))
        made.append(fingerprint_of(folder))
    assert len(set(made)) == 3
    assert "" not in made
    assert fingerprint_of(tmp_path / "None" / f"pytorch_model{suffix}") == made[0], "a file by itself"


def test_a_second_copy_under_other_names_does_not_count(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    before = fingerprint_of(folder)
    save_file({"all": torch.ones(3)}, folder / "consolidated.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"all of it again")
    assert fingerprint_of(folder) == before
    assert weight_files_of(folder)[0].name.startswith("model-00001")


def test_a_checkpoint_with_missing_files_has_no_fingerprint(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert fingerprint_of(folder) == ""
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert fingerprint_of(folder) == "", "a client's folder, where the index stayed behind"
    assert fingerprint_of(tmp_path / "nowhere") == ""


def test_a_checkpoint_of_many_tensors_has_its_last_ones_sampled(tmp_path: Path) -> None:
    made = []
    for last in (1.0, 2.0):
        tensors = {f"t{number:05d}": torch.full((4,), float(number)) for number in range(3 * SAMPLES)}
        tensors[max(tensors)] = torch.full((4,), last)
        folder = tmp_path / str(last)
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        made.append(fingerprint_of(folder))
    assert made[0] != made[1]


@given(data=st.binary(max_size=4096))
def test_a_file_that_is_no_safetensors_file_has_a_fingerprint_all_the_same(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors").write_bytes(data)
        assert fingerprint_of(folder)


def test_the_same_weights_in_other_files_have_the_same_fingerprint(tmp_path: Path) -> None:
    """`netloader pull` divides tensors among files in its own way; an engine that loads them has to match the seed."""
    usual = write(tmp_path / "a")
    written = tmp_path / "b"
    write_checkpoint(open_checkpoint(usual).tensors, written, shard_bytes=100_000)
    assert len(list(written.glob("*.safetensors"))) > 2
    assert fingerprint_of(written) == fingerprint_of(usual) == fingerprint_of(write(tmp_path / "c", shards=5))


@given(sizes=st.lists(st.integers(0, 1 << 40), max_size=60), most=st.integers(1, SAMPLES))
def test_the_documented_number_of_samples_lies_in_each_tensor(sizes: list[int], most: int) -> None:
    pieces = [fingerprint._Piece(b"", 0, sum(sizes[:number]), size) for number, size in enumerate(sizes)]
    places = fingerprint._places(pieces, most)
    filled = [piece for piece in pieces if piece.size]
    assert min(len(filled), most) <= len(places) <= most
    for _, at, length in places:
        assert any(piece.begin <= at and at + length <= piece.begin + piece.size for piece in filled)
    if filled:
        assert len({at for _, at, _ in places}) == len(places), "no place twice"
        assert any(at >= filled[-1].begin for _, at, _ in places), "the last tensor is among them"


def test_the_bytes_read_have_a_limit_for_any_number_of_files_and_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time depends on the machine; the number of samples read does not."""
    read: list[int] = []
    pread = os.pread

    def counted(descriptor: int, length: int, place: int) -> bytes:
        read.append(length)
        return pread(descriptor, length, place)

    folder = write(tmp_path / "a", shards=8)
    monkeypatch.setattr(os, "pread", counted)
    assert fingerprint_of(folder)
    samples = read[2 * 8 :]  # after the length and the header of each file
    assert len(NAMES) <= len(samples) <= SAMPLES
    assert sum(samples) <= SAMPLES * SAMPLE_BYTES
