"""Pulls to and from a real accelerator; skipped without one."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

import netloader
from netloader.errors import NoSourceLeft
from netloader.transports.conformance import CHECKS, Check, check_transport, pair_maker
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport
from netloader.transports.tcp import TcpTransport

IDENTITY = netloader.ModelIdentity(model="m")
ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)
DEVICE = f"{ACCELERATOR.type}:0" if ACCELERATOR is not None else "cpu"

pytestmark = pytest.mark.skipif(ACCELERATOR is None, reason="there is no accelerator here")


def weights(device: str) -> dict[str, torch.Tensor]:
    """Large and small, of many dtypes, empty, 0-dim, permuted, tied, and thousands of tiny ones."""
    chance = torch.Generator().manual_seed(7)

    def some(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        raw = torch.randint(0, 256, (*shape, torch.empty(0, dtype=dtype).element_size()), generator=chance)
        return raw.to(torch.uint8).view(dtype).reshape(shape).to(device)

    made = {
        "large": some(3000, 4000, dtype=torch.bfloat16),
        "half": some(1001, 77, dtype=torch.float16),
        "float8": some(999, 33, dtype=torch.float8_e4m3fn),
        "int8": some(513, 513, dtype=torch.int8),
        "whole": some(1_000, dtype=torch.int64),
        "flags": (some(12_345, dtype=torch.uint8) > 100),
        "scalar": some(1, dtype=torch.float32)[0],
        "empty": torch.empty(0, 7, dtype=torch.bfloat16, device=device),
        "permuted": some(300, 500, dtype=torch.bfloat16).t(),
        **{f"tiny.{number}": some(3 + number % 50, dtype=torch.bfloat16) for number in range(3000)},
    }
    return {**made, "tied": made["large"]}


def blank(tensors: Mapping[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    """Tensors like these with other bytes, on `device`."""
    owners: dict[int, torch.Tensor] = {}
    for tensor in tensors.values():
        owners.setdefault(id(tensor), torch.empty_like(tensor, device=device).fill_(1))
    return {name: owners[id(tensor)] for name, tensor in tensors.items()}


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tensors have the same bytes."""
    flat = [tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, two)]
    return one.shape == two.shape and one.dtype == two.dtype and torch.equal(*flat)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Check) -> None:
    await check_transport(pair_maker(TcpTransport(), device=DEVICE), [check])


@pytest.mark.parametrize(("there", "here"), [(DEVICE, DEVICE), ("cpu", DEVICE), (DEVICE, "cpu")])
async def test_a_pull_is_bit_exact_on_the_accelerator(there: str, here: str) -> None:
    source = weights(there)
    into = blank(source, here)
    async with netloader.Server(source, IDENTITY, host="127.0.0.1") as server:
        report = await netloader.pull(into, IDENTITY, sources=[server.address])
    assert [name for name, tensor in source.items() if not same(tensor, into[name])] == []
    assert [share.transport for share in report.sources.values()] == ["tcp"]


async def test_a_flipped_byte_is_detected_in_device_memory() -> None:
    source = weights(DEVICE)
    into = blank(source, DEVICE)
    harm = FaultyTransport(TcpTransport(), Faults([Fault(FaultKind.CORRUPT, 2, byte=9, times=None)]))
    async with netloader.Server(source, IDENTITY, host="127.0.0.1", transport=[harm]) as server:
        with pytest.raises(NoSourceLeft, match="block 2"):
            await netloader.pull(into, IDENTITY, sources=[server.address], transport="tcp")


async def test_staging_memory_is_bounded() -> None:
    source = {"large": torch.zeros(512 << 20, dtype=torch.uint8, device=DEVICE).random_()}
    into = {"large": torch.zeros_like(source["large"])}
    module = torch.get_device_module(DEVICE)
    async with netloader.Server(source, IDENTITY, host="127.0.0.1") as server:
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        await netloader.pull(into, IDENTITY, sources=[server.address])
        assert module.max_memory_allocated() - before <= 32 << 20
    assert torch.equal(source["large"], into["large"])
