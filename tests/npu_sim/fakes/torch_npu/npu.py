"""The part of ``torch.npu`` that is needed to transfer weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ._graphs import NPUGraph, graph
from ._memory import DEVICES, accounts
from ._streams import Stream, communicators, streams

__all__ = ["NPUGraph", "Stream", "graph"]


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def manual_seed_all(seed: int) -> None:
    return None


def device_count() -> int:
    return DEVICES


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
    if not 0 <= index < DEVICES:
        raise RuntimeError(f"invalid device index {index}")
    streams.device = index


def get_device_name(device: object = None) -> str:
    return "Ascend910B3"


def current_stream(device: object = None) -> Stream:
    return streams.current()


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
