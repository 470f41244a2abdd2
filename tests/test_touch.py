"""Pages that are allocated early: contents stay, and pages of other tensors are not touched."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading

import pytest
import torch

import netloader
from netloader.tensors import Prefaulter
from netloader.tensors import touch as touching

MIB = 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be asked for pages")


def mapped(nbytes: int) -> torch.Tensor:
    """A new mapping without resident pages."""
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


def resident(tensor: torch.Tensor) -> int:
    """Number of its resident pages."""
    pages = tensor.nbytes // mmap.PAGESIZE
    found = ctypes.create_string_buffer(pages)
    libc = ctypes.CDLL(None)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    assert libc.mincore(tensor.data_ptr(), tensor.nbytes, found) == 0
    return sum(page & 1 for page in found.raw)


def touch(*tensors: torch.Tensor) -> None:
    toucher = Prefaulter(tensors)
    toucher.start()
    if toucher._thread is not None:
        toucher._thread.join()
    toucher.stop()


def test_unused_pages_are_allocated_and_keep_their_contents() -> None:
    tensor = mapped(8 * MIB)
    tensor[3] = 7
    assert resident(tensor) < 100
    touch(tensor)
    assert resident(tensor) == 8 * MIB // mmap.PAGESIZE
    assert int(tensor[3]) == 7
    assert int(tensor.sum()) == 7


def test_only_whole_pages_of_the_tensor_itself_are_asked_for() -> None:
    memory = mapped(8 * MIB)
    touch(memory[mmap.PAGESIZE * 3 + 5 : 4 * MIB + 5])
    assert resident(memory) == 4 * MIB // mmap.PAGESIZE - 4
    assert resident(memory[: mmap.PAGESIZE * 4]) == 0
    assert resident(memory[4 * MIB :]) == 0


def test_memory_in_use_small_tensors_and_other_devices_are_not_touched() -> None:
    used = mapped(4 * MIB)
    used[2 * MIB] = 1
    before = resident(used)
    small = mapped(MIB // 2)
    touch(used, small, torch.empty(MIB, device="meta"), mapped(4 * MIB).view(2, -1).t())
    assert resident(used) == before
    assert resident(small) == 0


def test_touching_can_be_stopped_before_and_while_it_runs() -> None:
    toucher = Prefaulter([mapped(256 * MIB)])
    toucher.stop()
    toucher.start()
    toucher.stop()
    toucher.stop()


def test_stopping_is_bounded_and_a_call_that_hangs_keeps_its_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    go = threading.Event()

    class Hangs(Prefaulter):
        def _run(self) -> None:
            assert go.wait(60)

    monkeypatch.setattr(touching, "_END", 0.05)
    toucher = Hangs([mapped(MIB)])
    toucher.start()
    try:
        toucher.stop()
        assert toucher.running
        assert toucher._tensors
        assert "thread netloader-touch did not end within 0.05 s" in caplog.text
    finally:
        go.set()
    monkeypatch.setattr(touching, "_END", 60.0)
    toucher.stop()
    assert not toucher._tensors


async def test_a_pull_into_fresh_memory_is_exact() -> None:
    source = {"weight": torch.randint(0, 255, (32 * MIB,), dtype=torch.uint8)}
    into = {"weight": mapped(32 * MIB)}
    async with netloader.Server(source, host="127.0.0.1") as server:
        await netloader.pull(into, sources=[server.address])
    assert torch.equal(source["weight"], into["weight"])
