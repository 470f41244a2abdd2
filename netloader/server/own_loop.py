"""The servers that run in the event loop of the calling thread, so that a call that would block it can be refused."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from netloader.core.addresses import Address
from netloader.errors import LocalProtocolError

__all__ = ["refuse_to_block", "serving_at"]

_HERE = ("127.0.0.1", "::1", "localhost")

_addresses = WeakKeyDictionary[asyncio.AbstractEventLoop, list[frozenset[str]]]()
"""Of the servers of each event loop. Not a variable of anyio's, which has no value in a callback of the loop."""


@contextmanager
def serving_at(port: int, *hosts: str) -> Iterator[None]:
    """State that a server of this event loop listens on `port`, at `hosts` and at the loopback address."""
    servers = _addresses.setdefault(asyncio.get_running_loop(), [])
    own = frozenset(str(Address(host, port)) for host in (*hosts, *_HERE))
    servers.append(own)
    try:
        yield
    finally:
        servers.remove(own)


def refuse_to_block(sources: object, call: str) -> None:
    """Check that none of `sources` is a server that cannot answer because `call` blocks its event loop.

    Raises:
        LocalProtocolError: One of them is.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return  # this thread runs no event loop
    known = frozenset[str]().union(*_addresses.get(loop, []))
    given = getattr(sources, "sources", sources)  # of FixedSources; what other providers find is not known yet
    for source in given if isinstance(given, Collection) else ():
        address = str(getattr(source, "address", source))
        if address in known:
            raise LocalProtocolError(
                f"{address} is a server of the event loop that netloader.sync.{call} would block: it could not answer",
                hint=f"await netloader.{call}(...) instead, or start the server by netloader.sync.serve(...)",
            )
