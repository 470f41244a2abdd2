"""`pull` streams: the tensors that it fills are views of the files, so its memory does not grow with the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from netloader import ModelIdentity
from netloader.checkpoint import OutputFolder, open_checkpoint
from netloader.core.manifest import Manifest
from netloader.tensors import destination, hold
from tests.cases.files import metadata_of, tensors


def manifest_of(content: dict[str, torch.Tensor]) -> Manifest:
    return hold(content, ModelIdentity()).announcement.manifest


def test_every_byte_of_the_tensors_is_in_a_mapped_file(tmp_path: Path) -> None:
    with OutputFolder(tmp_path, shard_bytes=1000) as output:
        filled = destination(None, allocate=output.allocate)
        filled.adopt(manifest_of(tensors("a", "b", "c")), {})
        mapped = []
        for line in Path("/proc/self/maps").read_text().splitlines():
            if line.endswith(".part"):
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                mapped.append(range(start, end))
        assert len(mapped) == 3
        for tensor in filled.tensors.values():
            assert any(tensor.data_ptr() in of and tensor.data_ptr() + tensor.nbytes - 1 in of for of in mapped)


@pytest.mark.parametrize("shard_bytes", [200, 1 << 20])
def test_what_is_filled_is_read_back_whatever_its_layout(shard_bytes: int, tmp_path: Path) -> None:
    source = tensors("plain", "tied")
    source["format"] = source["tied"]
    source["turned"] = torch.arange(60.0).reshape(3, 4, 5).permute(2, 0, 1)
    source["wide"] = torch.arange(5, dtype=torch.float64)
    source["scalar"] = torch.tensor(3.5, dtype=torch.bfloat16)
    source["flags"] = torch.tensor([True, False, True])
    source["empty"] = torch.empty(0, 4)
    folder = tmp_path / "made"
    with OutputFolder(folder, shard_bytes=shard_bytes) as output:
        filled = output.allocate(manifest_of(source), {"format": "mlx"})
        for name, tensor in source.items():
            assert filled[name].stride() == tensor.stride()
            filled[name].copy_(tensor)
        seen: list[tuple[int, int]] = []
        output.sync(lambda done, total: seen.append((done, total)))
        assert [file for file in folder.iterdir() if not file.name.startswith(".")] == []
        files = output.publish()
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] == sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    read = open_checkpoint(folder)
    assert set(read.tensors) == set(source)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in source.items())
    assert read.metadata == {"format": "mlx"}
    assert metadata_of(files[0])["format"] == "mlx"
    assert sorted(folder.iterdir()) == sorted(files)
