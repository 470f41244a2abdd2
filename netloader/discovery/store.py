"""The contract of a registry: short texts under names, each of which expires unless it is renewed.

Redis and etcd differ in commands, not in what discovery needs of them. What finds, publishes and claims is written once
over this contract (`leases.py`), and each of them is one small store.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from netloader.core.entries import MAX_ENTRY_BYTES

__all__ = ["MAX_VALUE_BYTES", "LeaseStore", "OpenStore", "text_of"]

MAX_VALUE_BYTES = MAX_ENTRY_BYTES
"""Most bytes of a value that is written. An entry is the longest."""


class LeaseStore(Protocol):
    """One connection to a registry.

    Names are paths without a leading slash (``a/b/c``) of at most 512 characters. They consist of ASCII letters,
    digits and ``-._~:%@/``, so no name holds a wildcard of any registry. Values have at most `MAX_VALUE_BYTES` bytes.
    Each call ends within seconds, and raises `DiscoveryError` if the registry refuses or can't be reached. A call that
    failed or was cancelled may have had its effect all the same. A store connects by itself, on the first call and
    after a failure: the next call after a failure may succeed. Calls may overlap.

    The registry's own clock ends leases: never before `ttl` seconds have passed, and at most two seconds later. No
    clock of any host is compared with that of another.
    """

    async def put(self, name: str, value: bytes, *, ttl: float) -> None:
        """Write a value, whether or not the name has one. It expires `ttl` seconds (at least 1) from now."""
        ...

    async def create(self, name: str, value: bytes, *, ttl: float) -> bool:
        """Write a value if the name has none, in one step. Of several callers at most one is answered True."""
        ...

    async def renew(self, name: str, value: bytes, *, ttl: float) -> bool:
        """Let a name expire `ttl` seconds from now if its value is still `value`, in one step. Otherwise False."""
        ...

    async def remove(self, name: str, value: bytes) -> bool:
        """Remove a name if its value is still `value`, in one step. Otherwise False."""
        ...

    async def read(self, prefix: str, *, limit: int) -> Mapping[str, bytes]:
        """Names that begin with `prefix`, with their values: at most `limit`, those that are found first.

        Others may write there too. A name that is no UTF-8 is left out. A value that is too long is left out or cut
        off, at more than `MAX_VALUE_BYTES`; it hides no other.
        """
        ...

    def changes(self, prefix: str) -> AsyncGenerator[None, None]:
        """Yield when something below `prefix` may have changed: once at the beginning, then soon after each change.

        The first one comes when the registry has accepted the watch: a read after it misses no change of which none is
        yielded. It may yield more often than something changes, and need not tell that a name has expired. A lost
        connection raises `DiscoveryError`; the caller reads again and watches again.
        """
        ...


class OpenStore(Protocol):
    """Makes connections to one registry. Making the object does no I/O."""

    def __call__(self) -> AbstractAsyncContextManager[LeaseStore]:
        """Open a connection, and close it when the context is left.

        Entering raises nothing because of the registry: the first call connects. Leaving ends within 5 seconds, and
        raises nothing because of the registry.
        """
        ...


def text_of(name: bytes) -> str | None:
    """A name that a registry holds; None if it is no UTF-8, so that nobody can have published it with this package."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return None
