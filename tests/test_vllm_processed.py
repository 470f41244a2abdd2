"""Which values of a post-processed layer count as handles; with layers of torch, without vLLM."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from netloader.tensors import mappings
from netloader.vllm.model import object_walk
from netloader.vllm.model.ascend_table import Harmless
from netloader.vllm.model.processed import survey

SIZES = (1 << 32, (1 << 32) + 4096, 5_000_000_000, 300 << 30, (1 << 40) - 1)
"""Sizes in bytes that a layer may have as attributes: 4 GiB to 1 TiB."""


def problems_of(**values: Any) -> list[str]:
    layer: Any = torch.nn.Linear(2, 2)
    vars(layer).update(values)
    return survey(layer, {}).problems


def handle(name: str, value: int) -> str:
    return f"{name}: the number {value} may be the address of something (a handle)"


@contextmanager
def maps(monkeypatch: pytest.MonkeyPatch, path: Path, *lines: str) -> Iterator[None]:
    """Replace the system's list of this process's memory mappings."""
    path.write_text("".join(f"{line}\n" for line in lines))
    with monkeypatch.context() as patch:
        patch.setattr(mappings, "_MAPS", path)
        yield


def test_a_size_in_bytes_is_no_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = {f"size_{place}": size for place, size in enumerate(SIZES)}
    with maps(monkeypatch, tmp_path / "maps", "7fa185fe7000-7fa185fe8000 r--p 00000000 fe:00 2    /usr/lib/some.so"):
        assert problems_of(**sizes) == []


def test_a_number_that_points_into_mapped_memory_is_an_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = ("200000000-300200000 ---p 00000000 00:00 0", "7fa185fe7000-7fa185fe8000 r--p 00000000 fe:00 2    /a.so")
    with maps(monkeypatch, tmp_path / "maps", *lines):
        found = problems_of(before=0x200000000 - 1, first=0x200000000, last=0x3001FFFFF, past=0x300200000)
    assert found == [handle("first", 0x200000000), handle("last", 0x3001FFFFF)]


def test_an_address_in_mapped_memory_is_a_handle() -> None:
    buffer = ctypes.create_string_buffer(1 << 20)
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        view = (ctypes.c_char * mmap.PAGESIZE).from_buffer(page)
        numbers = {"buffer": ctypes.addressof(buffer), "page": ctypes.addressof(view) + 17, "own": id(page)}
        assert problems_of(**numbers) == [handle(name, value) for name, value in numbers.items()]
        del view


def test_a_device_address_is_a_handle_although_it_is_not_mapped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    far = {"device": 0x12C0C0000000, "first": 1 << 40, "last": (1 << 48) - 1}
    with maps(monkeypatch, tmp_path / "maps", "7fa185fe7000-7fa185fe8000 r--p 00000000 fe:00 2    /usr/lib/some.so"):
        assert problems_of(**far, seed=1 << 48) == [handle(name, value) for name, value in far.items()]


def test_an_address_in_a_tensor_is_a_handle_although_it_is_not_mapped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Storage:
        def data_ptr(self) -> int:
            return 6 << 30

        def nbytes(self) -> int:
            return 4096

    monkeypatch.setattr(
        "netloader.vllm.model.processed._separate_views", lambda walk: walk.found.tensors.update(walk.named)
    )
    monkeypatch.setattr(torch.nn.Parameter, "untyped_storage", lambda self: Storage())
    with maps(monkeypatch, tmp_path / "maps", "7fa185fe7000-7fa185fe8000 r--p 00000000 fe:00 2    /usr/lib/some.so"):
        found = problems_of(before=(6 << 30) - 1, inside=(6 << 30) + 64, past=(6 << 30) + 4096)
    assert found == [handle("inside", (6 << 30) + 64)]


def test_without_known_mappings_every_large_number_is_a_handle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mappings, "_MAPS", tmp_path / "none")
    assert problems_of(size=SIZES[0], count=4096) == [handle("size", SIZES[0])]


def test_a_process_group_is_no_handle() -> None:
    """Whatever class derives from torch's: packages of accelerators have their own."""

    class Group(torch.distributed.ProcessGroup):
        pass

    group: Any = Group(0, 1)  # type: ignore[call-arg]
    group.communicator = object()
    assert problems_of(device_group=group, groups=[group]) == []
    assert problems_of(opaque=object()) == ["opaque: builtins.object can't be looked into (a handle)"]


def test_a_value_is_left_out_by_its_name_and_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Experts(torch.nn.Module):
        pass

    owner = f"{Experts.__module__}.{Experts.__qualname__}"
    table = {"moe_instance_id": Harmless(frozenset({owner}), "it counts")}
    monkeypatch.setattr(object_walk, "HARMLESS", table)

    def values(**given: Any) -> set[str]:
        experts, other = Experts(), torch.nn.Module()
        for module in (experts, other):
            vars(module).update(given)
        return set(
            survey(torch.nn.ModuleDict({"experts": experts, "other": other, "rest": torch.nn.Linear(1, 1)}), {}).facts
        )

    found = values(moe_instance_id=3, other_id=4)
    assert {"other.moe_instance_id", "experts.other_id", "other.other_id"} <= found
    assert "experts.moe_instance_id" not in found
    experts: Any = Experts()
    experts.moe_instance_id = torch.ones(3)
    assert "experts.moe_instance_id" in survey(torch.nn.ModuleDict({"experts": experts}), {}).tensors
