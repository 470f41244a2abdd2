"""Checkpoints on disk: what is opened, what is refused, what is written."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from netloader.checkpoint import make_demo_checkpoint, open_checkpoint, write_checkpoint
from netloader.checkpoint.layout import FORMAT_NAMES
from netloader.core.identity import ModelIdentity
from netloader.core.manifest import ITEM_BYTES
from netloader.errors import CheckpointError, NetloaderError
from netloader.tensors import DTYPES, hold
from tests.tensor_sets import Sketch, build, sketches


def tensors_of(count: int = 6, rows: int = 50) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"layer.{n}.weight": torch.randn(rows, 20, generator=generator) for n in range(count)}


def row_major(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    def same(name: str) -> bool:
        if name not in left or name not in right:
            return False
        one, other = left[name], right[name]
        return (one.dtype, one.shape, row_major(one)) == (other.dtype, other.shape, row_major(other))

    return [name for name in sorted(left.keys() | right.keys()) if not same(name)]


def root_of(folder: Path) -> str:
    return hold(open_checkpoint(folder).tensors, ModelIdentity(layout="checkpoint")).announcement.root


def sharded(folder: Path, shard_bytes: int = 9000) -> dict[str, torch.Tensor]:
    tensors = tensors_of()
    write_checkpoint(tensors, folder, shard_bytes=shard_bytes)
    return tensors


def hidden_files(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir() if file.name.startswith(".")]


def test_the_format_names_every_dtype_but_two() -> None:
    assert set(ITEM_BYTES) - set(FORMAT_NAMES) == {"complex32", "complex128"}


@pytest.mark.parametrize("dtype", sorted(FORMAT_NAMES))
def test_every_dtype_of_the_format_is_read_back_by_safetensors(dtype: str, tmp_path: Path) -> None:
    memory = torch.arange(64, dtype=torch.uint8)
    if dtype == "bool":
        memory %= 2
    tensor = memory.view(DTYPES[dtype]).reshape(2, -1)
    write_checkpoint({"w": tensor, "byte": torch.ones(1, dtype=torch.uint8)}, tmp_path)
    read = load_file(tmp_path / "model.safetensors")
    assert differing(read, {"w": tensor, "byte": torch.ones(1, dtype=torch.uint8)}) == []


@given(sketch=sketches(), shard_bytes=st.sampled_from([1, 500, 1 << 20]))
def test_written_tensors_are_read_back(sketch: list[Sketch], shard_bytes: int) -> None:
    fit = [s for s in sketch if s.alias_of is None and s.dtype in FORMAT_NAMES]
    # An odd number of 4-bit pairs is valid; the format has no scalars of pairs.
    tensors = build([s for s in fit if s.dtype != "float4_e2m1fn_x2" or s.shape], seed=4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_checkpoint(tensors, folder, shard_bytes=shard_bytes)
        assert sorted(files) == sorted(folder.iterdir())
        checkpoint = open_checkpoint(folder)
        assert list(checkpoint.tensors) == sorted(tensors)
        assert differing(dict(checkpoint.tensors), tensors) == []
        through_library: dict[str, torch.Tensor] = {}
        for file in checkpoint.weight_files:
            through_library |= load_file(folder / file)
            with safe_open(folder / file, framework="pt") as opened:
                assert opened.metadata()["format"] == "pt"
        assert differing(through_library, tensors) == []


def test_opening_copies_nothing(tmp_path: Path) -> None:
    sharded(tmp_path)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not tell what is mapped")
    checkpoint = open_checkpoint(tmp_path)
    address = checkpoint.tensors["layer.0.weight"].data_ptr()
    for line in maps.read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            assert line.endswith(str(tmp_path / checkpoint.weight_files[0]))
            return
    pytest.fail("the tensor is nowhere")


def test_equal_weights_have_an_equal_root_however_they_are_stored(tmp_path: Path) -> None:
    tensors = tensors_of()
    tensors["scale"] = torch.ones(3, dtype=torch.float64)
    write_checkpoint(tensors, tmp_path / "one")
    write_checkpoint(dict(reversed(tensors.items())), tmp_path / "several", shard_bytes=9000)
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    roots = {root_of(tmp_path / folder) for folder in ("one", "several", "theirs")}
    assert len(roots) == 1
    assert root_of(tmp_path / "one" / "model.safetensors") in roots


def test_tied_tensors_are_stored_once_and_found_again(tmp_path: Path) -> None:
    tensors = tensors_of()
    tensors["lm_head.weight"] = tensors["layer.2.weight"]
    tensors["format"] = tensors["layer.2.weight"].detach()[:]
    tensors["view"] = tensors["layer.3.weight"].t()
    tensors["empty"], tensors["also_empty"] = torch.empty(0), torch.empty(0)
    (file,) = write_checkpoint(tensors, tmp_path, metadata={"root": "abc"})
    stored = load_file(file)
    assert tensors.keys() - stored.keys() == {"lm_head.weight", "format"}
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["root"] == "abc"
        assert opened.metadata()["lm_head.weight"] == "layer.2.weight"
    found = open_checkpoint(tmp_path).tensors
    assert list(found)[-1] == "lm_head.weight"
    assert found["lm_head.weight"] is found["layer.2.weight"]
    first = root_of(tmp_path)
    write_checkpoint(found, tmp_path, overwrite=True, shard_bytes=5000)
    assert root_of(tmp_path) == first


def test_other_files_beside_the_weights_are_listed(tmp_path: Path) -> None:
    sharded(tmp_path)
    for name in ("config.json", "tokenizer.json", "pytorch_model.bin", ".hidden", "pytorch_model.bin.index.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "folder").mkdir()
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.extra_files == ("config.json", "tokenizer.json")
    assert checkpoint.weight_files == tuple(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
    assert checkpoint.folder == tmp_path


def truncate(folder: Path) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def empty(folder: Path) -> None:
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"")


def garbage(folder: Path) -> None:
    (folder / "model-00001-of-00003.safetensors").write_bytes(b"\xff" * 1000)


def lose_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def lose_shard_and_index(folder: Path) -> None:
    lose_shard(folder)
    (folder / "model.safetensors.index.json").unlink()


def duplicate(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "other.safetensors")


def stray_shard(folder: Path) -> None:
    save_file({"new": torch.ones(3)}, folder / "model-00004-of-00004.safetensors")


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def unknown_to_index(folder: Path) -> None:
    change_index(folder, lambda placed: placed.pop("layer.3.weight"))


def misplaced(folder: Path) -> None:
    change_index(folder, lambda placed: placed.update({"layer.0.weight": "model-00003-of-00003.safetensors"}))


def lacking(folder: Path) -> None:
    change_index(folder, lambda placed: placed.update({"layer.9.weight": "model-00003-of-00003.safetensors"}))


def escaping(folder: Path) -> None:
    change_index(folder, lambda placed: placed.update({"layer.0.weight": "../secret.safetensors"}))


def broken_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1')


def two_indexes(folder: Path) -> None:
    (folder / "model.safetensors.index.json").rename(folder / "a.safetensors.index.json")
    shutil.copy(folder / "a.safetensors.index.json", folder / "b.safetensors.index.json")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, r"model-00002-of-00003.safetensors \(\d+ bytes\) is no complete safetensors file"),
        (empty, r"model-00003-of-00003.safetensors \(0 bytes\) is no complete safetensors file"),
        (garbage, "model-00001-of-00003.safetensors"),
        (lose_shard, "model-00002-of-00003.safetensors is missing, model.safetensors.index.json names it"),
        (lose_shard_and_index, "model-00002-of-00003.safetensors is missing, model-00001-of-00003"),
        (duplicate, "other.safetensors holds layer.0.weight, and so does model-00001"),
        (
            misplaced,
            "model-00003-of-00003.safetensors lacks layer.0.weight, which model.safetensors.index.json expects",
        ),
        (lacking, "model-00003-of-00003.safetensors lacks layer.9.weight"),
        (escaping, "names '../secret.safetensors', which is not a safetensors file of this folder"),
        (broken_index, "model.safetensors.index.json cannot be read"),
        (two_indexes, "several indexes: a.safetensors.index.json, b.safetensors.index.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(
    harm: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    sharded(tmp_path)
    harm(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert isinstance(caught.value, NetloaderError)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (stray_shard, "model-00004-of-00004.safetensors: model.safetensors.index.json does not name it"),
        (
            unknown_to_index,
            (
                "tensors layer.3.weight of model-00002-of-00003.safetensors: "
                "model.safetensors.index.json does not name them"
            ),
        ),
    ],
)
def test_what_the_index_does_not_name_is_left_out_and_said(
    harm: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    tensors = sharded(tmp_path)
    harm(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.left_out == (said,)
    left = {"layer.3.weight"} if harm is unknown_to_index else set()
    assert set(checkpoint.tensors) == set(tensors) - left


def test_a_consolidated_copy_beside_the_shards_is_ignored(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    save_file(tensors, tmp_path / "consolidated.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert "consolidated.safetensors" not in checkpoint.weight_files
    assert differing(dict(checkpoint.tensors), tensors) == []


def test_an_index_of_another_name_is_used(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "weights.safetensors.index.json")
    assert differing(dict(open_checkpoint(tmp_path).tensors), tensors) == []


def test_several_files_without_an_index_are_one_checkpoint(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    assert list(open_checkpoint(tmp_path).tensors) == ["a", "b"]


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has no safetensors file "):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"but pytorch_model.bin\).*convert it"):
        open_checkpoint(tmp_path)


def test_existing_weights_are_not_replaced_without_permission(tmp_path: Path) -> None:
    old = sharded(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is there already"):
        write_checkpoint(tensors_of(2), tmp_path)
    assert differing(dict(open_checkpoint(tmp_path).tensors), old) == []
    (file,) = write_checkpoint(tensors_of(2), tmp_path, overwrite=True)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "config.json", file]
    assert differing(dict(open_checkpoint(tmp_path).tensors), tensors_of(2)) == []


def test_a_write_that_fails_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = sharded(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    written = 0
    real = os.write

    def full(descriptor: int, data: memoryview) -> int:
        nonlocal written
        written += len(data)
        if written > 10_000:
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(CheckpointError, match=r"-of-00006.safetensors cannot be written.*No space left"):
            write_checkpoint(tensors_of(), tmp_path, overwrite=True, shard_bytes=4000)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert differing(dict(open_checkpoint(tmp_path).tensors), old) == []


@pytest.mark.parametrize("shard_bytes", [9000, 5000, 1 << 20])
@pytest.mark.parametrize("step", range(13))
def test_a_reader_never_reads_a_mixture_of_old_and_new_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, shard_bytes: int
) -> None:
    """Stopped before any rename or removal, the folder holds the old tensors, the new ones, or is refused."""
    old = sharded(tmp_path)
    new = {name: tensor + 1 for name, tensor in tensors_of().items()}
    steps = iter(range(step))

    def stop_before(call: Callable[..., object]) -> Callable[..., object]:
        def stepped(path: Path, *args: object, **kwargs: object) -> object:
            temporary_removed = call is unlink and path.suffix == ".part"
            if not temporary_removed and next(steps, None) is None:
                raise KeyboardInterrupt
            return call(path, *args, **kwargs)

        return stepped

    unlink = Path.unlink
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop_before(Path.replace))
        patch.setattr(Path, "unlink", stop_before(unlink))
        with contextlib.suppress(KeyboardInterrupt):
            write_checkpoint(new, tmp_path, overwrite=True, shard_bytes=shard_bytes)
    assert hidden_files(tmp_path) == []
    try:
        found = dict(open_checkpoint(tmp_path).tensors)
    except CheckpointError:
        return
    assert differing(found, old) == [] or differing(found, new) == []


def test_tensors_that_the_format_cannot_store_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd = {"a": torch.ones(3, dtype=torch.complex128), "b": torch.empty(3, dtype=torch.complex32)}
    with pytest.raises(CheckpointError, match=r"a \(torch.complex128\), b \(torch.complex32\)"):
        write_checkpoint(odd, tmp_path / "new")
    with pytest.raises(CheckpointError, match="__metadata__"):
        write_checkpoint({"__metadata__": torch.ones(3)}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be used"):
        write_checkpoint(tensors_of(), tmp_path / "file" / "folder")


def test_a_demo_checkpoint_has_the_size_asked_for_and_is_the_same_each_time(tmp_path: Path) -> None:
    size = 5_000_000
    files = make_demo_checkpoint(tmp_path / "a", size, seed=7)
    assert [file.name for file in files] == ["model.safetensors", "config.json"]
    checkpoint = open_checkpoint(tmp_path / "a")
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert size - 4 * config["hidden_size"] < total <= size
    assert checkpoint.extra_files == ("config.json",)
    embeddings = checkpoint.tensors["model.embed_tokens.weight"]
    assert embeddings.shape == (config["vocab_size"], config["hidden_size"])
    assert len(checkpoint.tensors) == 3 + 9 * config["num_hidden_layers"]
    for tensor in checkpoint.tensors.values():
        assert tensor.dtype == torch.bfloat16
        assert 2**-7 <= tensor.abs().min().item() <= tensor.abs().max().item() < 2**-3
    make_demo_checkpoint(tmp_path / "b", size, seed=7)
    make_demo_checkpoint(tmp_path / "c", size, seed=8)
    assert root_of(tmp_path / "a") == root_of(tmp_path / "b")
    assert root_of(tmp_path / "a") != root_of(tmp_path / "c")


def test_a_demo_checkpoint_is_the_same_on_every_machine(tmp_path: Path) -> None:
    make_demo_checkpoint(tmp_path, 1 << 20, seed=1)
    assert root_of(tmp_path) == "191504ab5ec0f652574fc857ccc4815a91208b5a617317deb620d0a6ab209a57"


def test_a_demo_checkpoint_has_a_smallest_size(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="at least 1048576 bytes, not 1000"):
        make_demo_checkpoint(tmp_path, 1000)
