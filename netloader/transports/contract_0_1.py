"""Adapters for transports that were written for the contract of release 0.1. To be removed after release 0.2.

In 0.1, ``offer`` returned ``(bytes, pending)``, the transport had ``accept(pending)``, and a channel need not have
``depth`` and ``whole_blocks``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, ParamSpec

from netloader.errors import TransportError
from netloader.transports.base import BlockView, Channel, Landed, Pending, Setup, Transport

__all__ = ["adapted", "adapted_pairs"]

_NOW = "docs/transports.md has the present contract; that of 0.1 is supported until after release 0.2"

P = ParamSpec("P")


def adapted(transport: Transport) -> Transport:
    """The transport itself. One with the method ``accept`` of 0.1 is wrapped in an adapter, with a warning."""
    if not hasattr(transport, "accept"):
        return transport
    _warn(f"transport {transport.name!r} ({type(transport).__name__}) is written for netloader 0.1: {_NOW}")
    return _Transport(transport)


def adapted_pairs(
    make_pair: Callable[P, AbstractAsyncContextManager[tuple[Channel, Channel]]],
) -> Callable[P, AbstractAsyncContextManager[tuple[Channel, Channel]]]:
    """Wrap a maker of pairs: channels of 0.1 get ``depth`` and ``whole_blocks``, with a warning."""

    @asynccontextmanager
    async def make(*args: P.args, **kwargs: P.kwargs) -> AsyncIterator[tuple[Channel, Channel]]:
        async with make_pair(*args, **kwargs) as (server, client):
            ends = _complete(server), _complete(client)
            if ends != (server, client):
                _warn(f"{type(server).__name__} is a channel of netloader 0.1: {_NOW}")
            yield ends

    return make


def _warn(message: str) -> None:
    """Warn, with the first caller outside of this package as the location."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and f"{frame.f_globals.get('__name__')}.".startswith("netloader."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, DeprecationWarning, stacklevel=level)


def _complete(channel: Any) -> Channel:
    return channel if isinstance(channel, Channel) else _Channel(channel)


class _Transport:
    def __init__(self, inner: Any) -> None:
        self.name: str = inner.name
        self._inner = inner

    def __repr__(self) -> str:
        return f"<{self._inner!r}, of 0.1>"

    def missing(self, device: str) -> str | None:
        """See :class:`netloader.transports.base.Transport`."""
        reason: str | None = self._inner.missing(device)
        return reason

    def facts(self, device: str) -> Mapping[str, str]:
        """See :class:`netloader.transports.base.Transport`."""
        facts: Mapping[str, str] = self._inner.facts(device)
        return facts

    async def offer(self, setup: Setup) -> Pending:
        """See :class:`netloader.transports.base.Transport`."""
        made = await self._inner.offer(setup)
        if not isinstance(made, tuple):
            await made.aclose()
            raise TransportError(
                f"transport {self.name} has a method accept, as in netloader 0.1, but its offer returns "
                f"{type(made).__name__}, as today",
                hint="accept belongs to what offer returns; the transport itself must not have it",
            )
        return _Pending(self._inner, *made)

    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        """See :class:`netloader.transports.base.Transport`."""
        return _complete(await self._inner.connect(offer, setup))


class _Pending:
    def __init__(self, transport: Any, offer: bytes, inner: Any) -> None:
        self.offer = offer
        self._transport = transport
        self._inner = inner

    async def accept(self) -> Channel:
        """See :class:`netloader.transports.base.Pending`."""
        return _complete(await self._transport.accept(self._inner))

    async def aclose(self) -> None:
        """See :class:`netloader.transports.base.Pending`."""
        await self._inner.aclose()


class _Channel:
    def __init__(self, inner: Channel) -> None:
        self.depth: int = getattr(inner, "depth", 1)
        self.whole_blocks: bool = getattr(inner, "whole_blocks", False)
        self._inner = inner

    async def send(self, blocks: Sequence[BlockView]) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        await self._inner.send(blocks)

    async def recv(self, blocks: Sequence[BlockView], landed: Landed | None = None) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        await self._inner.recv(blocks, landed)

    async def aclose(self) -> None:
        """See :class:`netloader.transports.base.Channel`."""
        await self._inner.aclose()
