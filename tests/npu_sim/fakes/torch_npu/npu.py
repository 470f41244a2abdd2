"""The part of ``torch.npu`` that is needed to build models, to load and post-process them, and to transfer weights."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator

import torch

from ._cards import visible
from ._events import Event, ExternalEvent
from ._graphs import NPUGraph, graph
from ._memory import accounts
from ._streams import Stream, communicators, streams

__all__ = ["Event", "ExternalEvent", "NPUGraph", "Stream", "graph"]

config = types.SimpleNamespace(allow_internal_format=True)
"""Settings of the library. Private formats are simulated whatever this says."""

_ASCEND_910B3 = 223


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def manual_seed_all(seed: int) -> None:
    return None


def _lazy_init() -> None:
    return None


def get_soc_version() -> int:
    return _ASCEND_910B3


def device_count() -> int:
    return len(visible())


def _index(device: torch.device | str | int | None) -> int:
    if device is None:
        return streams.device
    if isinstance(device, int):
        return device
    index: int | None = torch.device(device).index
    return streams.device if index is None else index


def current_device() -> int:
    return streams.device


def set_device(device: torch.device | str | int) -> None:
    index = _index(device)
    if not 0 <= index < device_count():
        raise RuntimeError(f"invalid device index {index}")
    streams.device = index


def get_device_name(device: object = None) -> str:
    return "Ascend910B3"


def current_stream(device: object = None) -> Stream:
    return streams.current()


def default_stream(device: object = None) -> Stream:
    return streams.stack[0]


def set_stream(stream: Stream) -> None:
    streams.stack[-1] = stream


@contextlib.contextmanager
def stream(stream: Stream) -> Iterator[None]:
    streams.stack.append(stream)
    try:
        yield
    finally:
        streams.stack.pop()


def synchronize(device: object = None) -> None:
    streams.current().drain()
    for one in list(communicators):
        one.drain()


def empty_cache() -> None:
    return None


def mem_get_info(device: torch.device | str | int | None = None) -> tuple[int, int]:
    return accounts.limit - accounts.used[_index(device)], accounts.limit


def memory_stats(device: torch.device | str | int | None = None) -> dict[str, int]:
    """Bytes in use, under the names of torch_npu's allocator. There is no cache, and the peak is not recorded."""
    used = accounts.used[_index(device)]
    return {f"{what}_bytes.all.{when}": used for what in ("allocated", "reserved") for when in ("current", "peak")}


def memory_allocated(device: torch.device | str | int | None = None) -> int:
    return accounts.used[_index(device)]


memory_reserved = max_memory_allocated = max_memory_reserved = memory_allocated


def reset_peak_memory_stats(device: torch.device | str | int | None = None) -> None:
    return None
