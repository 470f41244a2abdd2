"""Memory of a pool, whose pages an allocator takes away and gives back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
import torch_npu
from torch_npu import _pools


class Allocator:
    """What vllm-ascend's allocator keeps of the memory that it was told of."""

    def __init__(self) -> None:
        self.handles: dict[int, _pools.Handle] = {}

    def allocated(self, handle: _pools.Handle) -> None:
        self.handles[handle[2]] = handle

    def freed(self, address: int) -> _pools.Handle:
        return self.handles.pop(address)


@pytest.fixture
def allocator() -> Allocator:
    made = Allocator()
    _pools.init_module(made.allocated, made.freed)
    return made


@pytest.fixture
def pool(allocator: Allocator) -> _pools.MemPool:
    return _pools.MemPool(_pools.NPUPluggableAllocator(None, "my_malloc", "my_free")._allocator)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = torch_npu.npu.memory_allocated(0)
    yield
    assert torch_npu.npu.memory_allocated(0) == before


def test_a_pool_takes_what_this_thread_allocates(allocator: Allocator, pool: _pools.MemPool) -> None:
    before = torch_npu.npu.memory_allocated(0)
    with _pools.use_mem_pool(pool):
        made = torch.full((1000,), 7, dtype=torch.int64, device="npu:0")
        others: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: others.append(torch.zeros(1, device="npu:0")))
        thread.start()
        thread.join()
    outside = torch.zeros(1, device="npu:0")
    ((device, nbytes, address, _),) = (handle for handle in allocator.handles.values() if handle[1] == 8192)
    assert (device, address) == (0, made.untyped_storage().data_ptr())
    assert not allocator.handles.keys() & {x.untyped_storage().data_ptr() for x in (*others, outside)}
    assert nbytes <= torch_npu.npu.memory_allocated(0) - before
    del made
    assert address not in allocator.handles


def test_pages_come_back_with_undefined_contents(allocator: Allocator, pool: _pools.MemPool) -> None:
    with _pools.use_mem_pool(pool):
        made = torch.full((4096,), 7, dtype=torch.uint8, device="npu:0")
    handle = allocator.handles[made.untyped_storage().data_ptr()]
    before = torch_npu.npu.memory_allocated(0)
    _pools.python_unmap_and_release(*handle)
    assert before - torch_npu.npu.memory_allocated(0) == 4096
    _pools.python_create_and_map(*handle)
    assert torch_npu.npu.memory_allocated(0) == before
    assert made.cpu().eq(_pools.UNDEFINED).all()
    made.fill_(9)
    assert made.cpu().eq(9).all()


def test_what_is_freed_without_pages_is_not_accounted_for_twice(allocator: Allocator, pool: _pools.MemPool) -> None:
    with _pools.use_mem_pool(pool):
        made = torch.zeros(4096, dtype=torch.uint8, device="npu:0")
    _pools.python_unmap_and_release(*allocator.handles[made.untyped_storage().data_ptr()])
    del made
    assert not allocator.handles


def test_reading_memory_without_pages_ends_the_process(allocator: Allocator, pool: _pools.MemPool) -> None:
    with _pools.use_mem_pool(pool):
        made = torch.zeros(4096, dtype=torch.uint8, device="npu:0")
    handle = allocator.handles[made.untyped_storage().data_ptr()]
    _pools.python_unmap_and_release(*handle)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # pytest would report it
        made.cpu()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGSEGV
    _pools.python_create_and_map(*handle)
