"""The conformance suite, over HCCL."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from netloader.transports.conformance import CHECKS, check_transport
from tests.npu_sim.inside.pairs import pair


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_conformance(check: Callable[..., Awaitable[None]]) -> None:
    await check_transport(pair, [check])
