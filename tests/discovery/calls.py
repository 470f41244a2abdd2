"""Calls to a registry that fail, or succeed some time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
import pytest

from netloader.errors import DiscoveryError

__all__ = ["refused", "succeeds", "until"]

T = TypeVar("T")


async def succeeds(call: Callable[[], Awaitable[T]], within: float = 30.0) -> T:
    """The answer of a call that is made until it succeeds."""
    with anyio.fail_after(within):
        while True:
            try:
                return await call()
            except DiscoveryError:
                await anyio.sleep(0.05)


async def until(ask: Callable[[], Awaitable[str]], text: str) -> None:
    """Wait until an answer has this text."""
    with anyio.fail_after(20):
        while text not in await ask():  # noqa: ASYNC110 - another process changes it
            await anyio.sleep(0.1)


async def refused(call: Callable[[], Awaitable[object]], within: float = 20.0) -> DiscoveryError:
    """The error of a call that fails in time."""
    with anyio.fail_after(within), pytest.raises(DiscoveryError) as caught:
        await call()
    return caught.value
