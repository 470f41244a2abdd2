"""Private memory formats, dtypes that HCCL lacks, and a model."""

from __future__ import annotations

import logging

import pytest
import torch
import torch_npu

import netloader
from netloader.codecs import npu_formats
from netloader.core.identity import ModelIdentity
from netloader.core.manifest import Manifest
from netloader.core.plan import make_plan
from netloader.errors import ManifestError, NoSourceLeft, TransportUnavailable
from netloader.tensors import describe, digest_of, hold
from tests.hccl import weights
from tests.npu_sim.inside.kit import FRACTAL_NZ, packed, pulled, tiled

SERVER, CLIENT = "npu:1", "npu:0"


def values(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "bf16": torch.randn(40, 70, generator=generator).to(torch.bfloat16),
        "int8": torch.randint(-9, 9, (3, 17, 65), generator=generator, dtype=torch.int8),
        "large": torch.randn(1500, 2000, generator=generator),  # several blocks
    }


def test_the_memory_format_is_part_of_the_manifest() -> None:
    manifest, _ = describe({"a": tiled(values(1)["bf16"], SERVER), "b": values(1)["bf16"].to(SERVER)})
    assert [spec.format for spec in manifest.tensors] == ["fractal-nz", "nd"]


def test_a_view_of_a_part_of_tiled_memory_is_refused() -> None:
    whole = tiled(values(1)["bf16"], SERVER)
    part = torch.empty(0, dtype=whole.dtype, device=SERVER).set_(whole.untyped_storage(), 70, (8, 70), (70, 1))
    with pytest.raises(ManifestError, match="fractal-nz, which has no parts"):
        describe({"a": part})


def test_digests_of_tiles_are_those_of_the_plain_bytes() -> None:
    plain = values(2)
    of_tiles = hold({name: tiled(value, SERVER) for name, value in plain.items()}, ModelIdentity())
    of_rows = hold(plain, ModelIdentity())
    assert of_tiles.announcement.digests == of_rows.announcement.digests
    assert of_tiles.announcement.root != of_rows.announcement.root  # the manifest names the format


async def test_tiles_are_pulled_and_keep_their_storage() -> None:
    theirs, ours = values(3), values(4)
    served = {name: tiled(value, SERVER) for name, value in theirs.items()}
    into = {name: tiled(value, CLIENT) for name, value in ours.items()}
    addresses = {name: tensor.data_ptr() for name, tensor in into.items()}
    await pulled(served, into)
    for name, tensor in into.items():
        assert torch.equal(tensor.cpu(), theirs[name]), name
        assert torch_npu.get_npu_format(tensor) == FRACTAL_NZ
        assert tensor.data_ptr() == addresses[name]


async def test_int8_tiles_with_dtype_int32_are_pulled() -> None:
    generator = torch.Generator().manual_seed(5)
    theirs = torch.randint(-128, 127, (32, 64), generator=generator, dtype=torch.int8)
    served, into = packed(theirs, SERVER), packed(torch.zeros_like(theirs), CLIENT)
    with pytest.raises(RuntimeError, match="int32 has no FRACTAL_NZ form"):
        torch_npu.npu_format_cast(served, 2)  # the reason for the codec
    await pulled({"w": served}, {"w": into})
    assert into.dtype == torch.int32
    assert torch.equal(into.view(torch.int8).cpu(), theirs)


async def test_formats_that_differ_are_refused_before_the_first_byte(caplog: pytest.LogCaptureFixture) -> None:
    theirs, ours = values(6), values(7)
    into = {name: value.to(CLIENT) for name, value in ours.items()}
    with pytest.raises(NoSourceLeft, match="format is 'nd' here and 'fractal-nz' at the server"):
        await pulled({name: tiled(value, SERVER) for name, value in theirs.items()}, into)
    assert all(torch.equal(into[name].cpu(), ours[name]) for name in into)
    (line,) = [r.getMessage() for r in caplog.records if r.module == "pull"]
    assert (
        "3 tensors differ from what the server holds; bf16: format is 'nd' here and 'fractal-nz' at the server" in line
    )


@pytest.mark.parametrize("transport", ["auto", "hccl"])
async def test_a_rank_table_excludes_hccl_and_is_named_as_the_reason(
    transport: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With `auto` another transport is chosen, and the client's log says why; requested by name, it is an error."""
    caplog.set_level(logging.INFO, logger="netloader")
    theirs = values(8)
    into = {name: torch.zeros_like(value).to(CLIENT) for name, value in theirs.items()}
    served = {name: value.to(SERVER) for name, value in theirs.items()}
    monkeypatch.setenv("RANK_TABLE_FILE", "/etc/table.json")
    async with netloader.Server(served, host="127.0.0.1", transport="auto", fan_out=0) as server:
        source = f"127.0.0.1:{server.port}"
        if transport == "hccl":
            with pytest.raises(TransportUnavailable, match="hccl: RANK_TABLE_FILE is set"):
                await netloader.pull(into, sources=[source], transport=transport)
            return
        await netloader.pull(into, sources=[source], transport=transport)
    (line,) = [r.getMessage() for r in caplog.records if f"source {source}: transport " in r.getMessage()]
    assert "hccl: RANK_TABLE_FILE is set" in line
    assert all(torch.equal(into[name].cpu(), theirs[name]) for name in into)


async def test_every_dtype() -> None:
    theirs = weights.on_cpu(8, 8)
    into = weights.on_device(theirs, CLIENT, empty=True)
    await pulled(weights.on_device(theirs, SERVER, empty=False), into)
    assert weights.wrong(into, theirs) == []


async def test_the_same_pull_over_hccl_gloo_and_memory_ends_in_the_same_bytes_and_root() -> None:
    theirs = weights.on_cpu(9, 8)
    over_hccl = weights.on_device(theirs, CLIENT, empty=True)
    reports = [await pulled(weights.on_device(theirs, SERVER, empty=False), over_hccl)]
    for transport in ("gloo", "memory"):
        into = {name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for name, t in theirs.items()}
        async with netloader.Server(theirs, host="127.0.0.1", transport=transport, fan_out=0) as server:
            reports.append(await netloader.pull(into, sources=[f"127.0.0.1:{server.port}"], transport=transport))
        assert weights.wrong(over_hccl, into) == []
    assert len({(report.root, report.nbytes, report.blocks, report.tensors) for report in reports}) == 1


async def test_a_pulled_model_computes_the_same_on_the_device() -> None:
    def model(seed: int, device: str) -> torch.nn.Module:
        torch.manual_seed(seed)
        made = torch.nn.Sequential(torch.nn.Embedding(50, 32), torch.nn.Linear(32, 64), torch.nn.ReLU())
        made.append(torch.nn.Linear(64, 50))
        return made.to(device)

    theirs, ours = model(1, SERVER), model(2, CLIENT)
    tokens = torch.arange(9)
    expected = theirs(tokens.to(SERVER)).detach().cpu()
    assert not torch.equal(ours(tokens.to(CLIENT)).detach().cpu(), expected)
    await pulled(dict(theirs.named_parameters()), dict(ours.named_parameters()))
    assert torch.equal(ours(tokens.to(CLIENT)).detach().cpu(), expected)


def test_blocks_of_one_tensor_share_a_plain_copy_that_is_freed_with_them() -> None:
    tensor = tiled(values(1)["large"], SERVER)
    manifest, memory = describe({"w": tensor})
    plan = make_plan(manifest, 4 << 20)
    before = torch.npu.mem_get_info(SERVER)[0]  # type: ignore[attr-defined]
    blocks = memory.views(plan, range(len(plan.blocks)))
    assert len(blocks) > 1
    for block in blocks:
        digest_of(block, "xxh3-128")
    used = before - torch.npu.mem_get_info(SERVER)[0]  # type: ignore[attr-defined]
    assert tensor.numel() * 4 <= used < 2 * tensor.numel() * 4
    del block, blocks
    assert torch.npu.mem_get_info(SERVER)[0] == before  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("number", "name"), [(2, "nd"), (0, "nd"), (-1, "nd"), (29, "fractal-nz"), (50, "nz-c0-16"), (99, "npu-99")]
)
def test_memory_formats_have_names(number: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_npu, "get_npu_format", lambda tensor: number)
    assert npu_formats.format_of(torch.zeros(2, device=SERVER)) == name
    assert npu_formats.format_of(torch.zeros(2)) == "nd"


def test_a_manifest_with_tiles_is_refused_on_a_device_without_that_format() -> None:
    manifest, _ = describe({"a": tiled(values(1)["bf16"], SERVER)})
    assert isinstance(manifest, Manifest)
    from netloader.tensors import destination

    with pytest.raises(ManifestError, match="fractal-nz can't be allocated"):
        destination(None, device=CLIENT).adopt(manifest)


def test_the_simulated_device_applies_in_place_operators_to_tiles() -> None:
    """Of the simulator: changes by an engine to weights in tiles have to be visible."""
    values = torch.rand(40, 24)
    tensor = tiled(values, "npu:0")
    tensor.mul_(2)
    tensor.add_(1.0)
    assert torch.equal(tensor.cpu(), values * 2 + 1)
    assert torch_npu.get_npu_format(tensor) == FRACTAL_NZ
