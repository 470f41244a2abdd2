"""Which transport a pull uses, from end to end."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pytest
import torch

import netloader
from netloader.errors import NoSourceLeft, TransportError, TransportUnavailable
from netloader.transports.base import Channel, Pending, Setup
from netloader.transports.shm import ShmTransport
from netloader.transports.tcp import TcpTransport


class Broken(TcpTransport):
    """A transport that claims to be usable, and then fails."""

    name = "broken"

    def __init__(self, side: str) -> None:
        super().__init__()
        self._side = side

    async def offer(self, setup: Setup) -> Pending:
        if self._side == "server":
            raise TransportError("the system forbids it here")
        return await super().offer(setup)

    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        if self._side == "client":
            raise TransportUnavailable("the system forbids it here")
        return await super().connect(offer, setup)


class ElsewhereTransport(ShmTransport):
    def facts(self, device: str) -> Mapping[str, str]:
        return {**super().facts(device), "host": "another one"}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    large = {f"large.{n}": torch.rand(300_000 + n, generator=generator) for n in range(12)}
    return large | {f"small.{n}": torch.rand(n, generator=generator).to(torch.bfloat16) for n in range(1500)}


async def pulled(there: object, here: object) -> str:
    """Pull everything, and return the name of the transport that was used."""
    held = tensors()
    into = {name: torch.zeros_like(tensor) for name, tensor in held.items()}
    async with netloader.Server(held, host="127.0.0.1", transport=there) as server:  # type: ignore[arg-type]
        report = await netloader.pull(into, sources=[server.address], transport=here)  # type: ignore[arg-type]
    assert all(torch.equal(into[name], tensor) for name, tensor in held.items())
    (share,) = report.sources.values()
    return share.transport


@pytest.mark.parametrize("name", ["tcp", "shm", "gloo"])
async def test_a_transport_can_be_chosen_by_name(name: str) -> None:
    assert await pulled([name], [name]) == name


async def test_within_a_host_shm_is_chosen() -> None:
    assert await pulled("auto", "auto") == "shm"


async def test_between_hosts_tcp_is_chosen() -> None:
    assert await pulled([ElsewhereTransport(), "tcp"], [ShmTransport(), "tcp"]) == "tcp"


@pytest.mark.parametrize("side", ["server", "client"])
async def test_the_next_transport_is_used_when_one_fails(side: str, caplog: pytest.LogCaptureFixture) -> None:
    broken = Broken(side)
    with caplog.at_level(logging.WARNING, logger="netloader"):
        assert await pulled([broken, "tcp"], [broken, "tcp"]) == "tcp"
    told = [record.getMessage() for record in caplog.records if "not by broken" in record.getMessage()]
    assert len(told) == 1
    assert "the system forbids it here" in told[0]


async def test_without_a_usable_transport_the_error_has_the_reasons() -> None:
    broken = Broken("client")
    with pytest.raises(NoSourceLeft, match="the system forbids it here"):
        await pulled([broken], [broken])


async def test_a_pull_through_staging_memory_is_bit_exact() -> None:
    assert await pulled([TcpTransport(2, staged=100_000)], [TcpTransport(staged=70_001)]) == "tcp"
