"""Raw tensors computed from tiles and transposed weights on the device, with a fixed scratch memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import acl
import pytest
import torch
import torch_npu
from torch_npu import _memory as memory

from netloader.core.identity import ModelIdentity
from netloader.errors import ManifestError
from netloader.tensors import ComputedMemory, Inverse, Scratch, TensorMemory, computed, digest_plan, hold
from netloader.vllm.model.inverses import Form, as_it_is, find_inverse, sample_of
from tests.npu_sim.inside.kit import tiled

SERVER = "npu:1"
DEVICE = torch.device(SERVER)


def values(*shape: int, dtype: torch.dtype = torch.int8, seed: int = 1) -> torch.Tensor:
    return torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def processed(raw: torch.Tensor) -> torch.Tensor:
    """What vLLM-Ascend makes of int8 and four-bit weights."""
    return tiled(raw.transpose(-1, -2).contiguous(), SERVER)


def way_back(raw: torch.Tensor, now: torch.Tensor, scratch: Scratch) -> Inverse | None:
    sample = sample_of(raw, as_it_is(raw.nbytes), raw.nbytes, Scratch(torch.device("cpu")))
    return find_inverse(Form(raw.dtype, tuple(raw.shape), tuple(raw.stride())), sample, now, scratch)


MATRICES: Sequence[tuple[Sequence[int], torch.dtype]] = [
    ((64, 48), torch.int8),
    ((96, 33), torch.int8),  # rows of tiles that are not full
    ((128, 64), torch.bfloat16),
    ((32, 200), torch.float32),
    ((5, 64, 70), torch.int8),
    ((3, 2, 32, 20), torch.bfloat16),
    ((1, 800, 1600), torch.int8),
]
ROOMS = [2048, 64 << 10, computed.SCRATCH_BYTES]
FEW = 20_000
"""Elements up to which the least room takes no thousands of steps."""


@pytest.mark.parametrize(
    ("shape", "dtype", "room"),
    [(*one, room) for one in MATRICES for room in ROOMS if room > ROOMS[0] or math.prod(one[0]) <= FEW],
)
@pytest.mark.parametrize("block_bytes", [1024, 3000, 1 << 20])
def test_blocks_of_tiles_have_the_raw_bytes(
    shape: Sequence[int], dtype: torch.dtype, room: int, block_bytes: int
) -> None:
    """Also where a row of tiles does not fit into the scratch memory, and where blocks cut rows, tiles and elements."""
    raw = values(*shape, dtype=dtype)
    before = {"a": values(333, seed=2), "raw": raw, "b": values(700, seed=3)}
    now, scratch = processed(raw), Scratch(DEVICE, tiled=True, nbytes=room)
    inverse = way_back(raw, now, scratch)
    assert inverse is not None
    assert inverse.steps == ("untile", "transpose")
    known = hold(before, ModelIdentity(), block_bytes=block_bytes).announcement
    on_device = [before["a"].to(SERVER), now, before["b"].to(SERVER)]
    found = ComputedMemory(TensorMemory(known.manifest, on_device, DEVICE), {1: inverse}, scratch)
    used = memory.accounts.used[1]
    assert digest_plan(found, known.plan, known.algorithm, threads=2) == known.digests
    assert memory.accounts.used[1] == used, "the device's memory does not grow"


def test_packed_four_bit_weights_are_read_as_bytes() -> None:
    raw = values(256, 64)
    now, scratch = processed(raw).view(torch.int32), Scratch(DEVICE, tiled=True)
    inverse = way_back(raw, now, scratch)
    assert inverse is not None
    assert inverse.steps == ("untile", "view int8", "transpose")
    known = hold({"w": raw}, ModelIdentity(), block_bytes=5000).announcement
    found = ComputedMemory(TensorMemory(known.manifest, [now], DEVICE), {0: inverse}, scratch)
    assert digest_plan(found, known.plan, known.algorithm, threads=1) == known.digests


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_tensors_are_transposed_on_the_device_without_more_memory(dtype: torch.dtype) -> None:
    raw = values(4, 90, 70, dtype=torch.bfloat16)
    now = raw.to(dtype).transpose(1, 2).contiguous().to(SERVER)
    scratch = Scratch(DEVICE, nbytes=4096)
    inverse = way_back(raw, now, scratch)
    assert inverse is not None
    known = hold({"w": raw}, ModelIdentity(), block_bytes=7000).announcement
    found = ComputedMemory(TensorMemory(known.manifest, [now], DEVICE), {0: inverse}, scratch)
    used = memory.accounts.used[1]
    assert digest_plan(found, known.plan, known.algorithm, threads=1) == known.digests
    assert memory.accounts.used[1] == used


@pytest.mark.parametrize("shape", [(64, 48), (33, 64), (64, 64)])
def test_other_tiles_have_no_way_back(shape: tuple[int, int]) -> None:
    """Not transposed, or with columns that do not fill their tiles."""
    raw, scratch = values(*shape), Scratch(DEVICE, tiled=True)
    now = processed(raw) if shape[0] == 33 else tiled(raw, SERVER)
    assert way_back(raw, now, scratch) is None


def test_an_error_of_the_runtime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, scratch = values(64, 48), Scratch(DEVICE, tiled=True)
    now = processed(raw)
    monkeypatch.setattr(acl.rt, "memcpy_async", lambda *_: 107002)
    with pytest.raises(ManifestError, match=r"acl\.rt\.memcpy_async returned 107002"):
        way_back(raw, now, scratch)


def test_a_computation_waits_while_graphs_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, scratch = values(64, 48), Scratch(DEVICE, tiled=True)
    now = processed(raw)
    found: list[Inverse | None] = []
    thread = threading.Thread(target=lambda: found.append(way_back(raw, now, scratch)), name="computes")
    with scratch.paused():
        thread.start()
        thread.join(0.2)
        assert not found
    thread.join(30)
    assert found[0] is not None
    monkeypatch.setattr(computed, "_PAUSED_SECONDS", 0.01)
    with scratch.paused(), pytest.raises(ManifestError, match="npu:1 is busy"):
        way_back(raw, now, scratch)


def test_the_thread_keeps_its_device_and_its_stream() -> None:
    """A load computes in the engine's thread."""
    raw, scratch = values(64, 48), Scratch(DEVICE, tiled=True)
    torch_npu.npu.set_device(0)
    stream = torch_npu.npu.current_stream()
    assert way_back(raw, processed(raw), scratch) is not None
    assert torch_npu.npu.current_device() == 0
    assert torch_npu.npu.current_stream() is stream


def test_it_computes_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, scratch = values(64, 48), Scratch(DEVICE, tiled=True)
    now, engine = processed(raw), torch_npu.npu.current_stream()
    copy, seen = acl.rt.memcpy_async, set[int]()

    def watched(into: int, room: int, source: int, nbytes: int, kind: int, stream: int) -> int:
        assert torch_npu.npu.current_stream().npu_stream == stream
        seen.add(stream)
        return int(copy(into, room, source, nbytes, kind, stream))

    monkeypatch.setattr(acl.rt, "memcpy_async", watched)
    assert way_back(raw, now, scratch) is not None
    assert len(seen) == 1
    assert engine.npu_stream not in seen
