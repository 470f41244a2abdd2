"""Every transport, same suite."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from netloader.transports.base import Transport
from netloader.transports.conformance import CHECKS, check_transport, pair_maker
from netloader.transports.faults import Faults, FaultyTransport
from netloader.transports.gloo import GlooTransport
from netloader.transports.memory import MemoryHub, MemoryTransport

MAKERS: dict[str, Callable[[], Transport]] = {
    "memory": MemoryTransport,
    "memory in small steps": lambda: MemoryTransport(MemoryHub(65_537)),
    "memory in lockstep": lambda: MemoryTransport(MemoryHub(0)),
    "gloo": GlooTransport,
    "gloo without faults": lambda: FaultyTransport(GlooTransport(), Faults()),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", MAKERS)
async def test_conformance(name: str, check: Callable[..., Awaitable[None]]) -> None:
    await check_transport(pair_maker(MAKERS[name]()), [check])
