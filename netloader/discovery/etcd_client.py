"""A registry in etcd: one lease for each name, renewed without a write, and watches.

Renewing compares the value first and then prolongs the lease that stands beside it. Between the two another value may
be written: it has a lease of its own, so nothing of it is prolonged.
"""

from __future__ import annotations

import math
from base64 import b64decode
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from itertools import islice
from typing import Any

import msgspec

from netloader.discovery.etcd_http import EtcdGateway, EtcdRefusal, LongAnswer, encoded
from netloader.discovery.registry_urls import RegistryUrl
from netloader.discovery.store import MAX_VALUE_BYTES, text_of

__all__ = ["EtcdStore", "opened"]

_PAGE = 256
"""Names that are read in one call: their values are decoded without giving others the event loop."""

_NOT_FOUND = 5
_NO_LEASE = "0"


class _Value(msgspec.Struct):
    key: str
    value: str = ""
    lease: str = _NO_LEASE


class _Range(msgspec.Struct):
    kvs: list[_Value] = []
    more: bool = False


class _Response(msgspec.Struct):
    response_range: _Range = msgspec.field(default_factory=_Range)


class _Transaction(msgspec.Struct):
    succeeded: bool = False
    responses: list[_Response] = []


class _Granted(msgspec.Struct):
    lease: str = msgspec.field(name="ID")


class _Lasts(msgspec.Struct):
    ttl: str = msgspec.field(name="TTL", default="0")
    granted: str = msgspec.field(name="grantedTTL", default="0")


class _KeptAlive(msgspec.Struct):
    result: _Lasts = msgspec.field(default_factory=_Lasts)


class _Anything(msgspec.Struct):
    """An answer that says no more than that it was done."""


@asynccontextmanager
async def opened(url: RegistryUrl, deadline: float) -> AsyncIterator[EtcdStore]:
    """A connection to the etcd that a URL names. The first call connects."""
    gateway = EtcdGateway(url, deadline)
    try:
        yield EtcdStore(gateway)
    finally:
        await gateway.aclose()


class EtcdStore:
    """A connection to etcd. A `LeaseStore`.

    Leases last whole seconds, and at least as long as etcd says: 1.5 times its election time-out, by default 2 seconds.

    Args:
        gateway: Makes the calls.
    """

    def __init__(self, gateway: EtcdGateway) -> None:
        self._gateway = gateway
        self._leases: dict[str, tuple[str, int]] = {}  # by name: the lease that we gave it, and its seconds

    async def put(self, name: str, value: bytes, *, ttl: float) -> None:
        """See :meth:`netloader.discovery.store.LeaseStore.put`."""
        seconds = math.ceil(ttl)
        lease, granted = self._leases.get(name, (_NO_LEASE, 0))
        if granted == seconds and await self._prolong(lease):
            try:
                await self._gateway.call("kv/put", _put(name, value, lease), _Anything)
            except EtcdRefusal as error:
                if error.code != _NOT_FOUND:
                    raise
            else:
                return
        lease = await self._grant(seconds)
        await self._gateway.call("kv/put", _put(name, value, lease), _Anything)
        self._leases[name] = lease, seconds

    async def create(self, name: str, value: bytes, *, ttl: float) -> bool:
        """See :meth:`netloader.discovery.store.LeaseStore.create`."""
        missing = _is(name, "CREATE", create_revision="0")
        if not (await self._transaction(missing)).succeeded:  # most that ask come too late: no lease for them
            return False
        seconds = math.ceil(ttl)
        lease = await self._grant(seconds)
        if not (await self._transaction(missing, {"request_put": _put(name, value, lease)})).succeeded:
            return False
        self._leases[name] = lease, seconds
        return True

    async def renew(self, name: str, value: bytes, *, ttl: float) -> bool:
        """See :meth:`netloader.discovery.store.LeaseStore.renew`."""
        seconds, same = math.ceil(ttl), _is(name, "VALUE", value=encoded(value))
        found = await self._transaction(same, {"request_range": {"key": encoded(name)}})
        if not found.succeeded:
            return False
        lease = found.responses[0].response_range.kvs[0].lease
        if await self._granted(name, lease) == seconds:
            return await self._prolong(lease)
        lease = await self._grant(seconds)
        if not (await self._transaction(same, {"request_put": _put(name, value, lease)})).succeeded:
            return False
        self._leases[name] = lease, seconds
        return True

    async def remove(self, name: str, value: bytes) -> bool:
        """See :meth:`netloader.discovery.store.LeaseStore.remove`."""
        self._leases.pop(name, None)
        same = _is(name, "VALUE", value=encoded(value))
        return (await self._transaction(same, {"request_delete_range": {"key": encoded(name)}})).succeeded

    async def read(self, prefix: str, *, limit: int) -> Mapping[str, bytes]:
        """See :meth:`netloader.discovery.store.LeaseStore.read`."""
        found: dict[str, bytes] = {}
        first, end, more, most = prefix.encode(), _after(prefix), True, _PAGE
        while more and len(found) < limit:
            count = min(most, limit - len(found))
            body = {"key": encoded(first), "range_end": encoded(end), "limit": count}
            try:
                page = await self._gateway.call("kv/range", body, _Range)
            except LongAnswer:  # another has written long values there
                most = count // 2
                if most:
                    continue
                # This is the one. Only its name is asked for, and it is left out.
                page = await self._gateway.call("kv/range", {**body, "keys_only": True}, _Range)
            else:
                names = [(text_of(b64decode(each.key)), each.value) for each in page.kvs]
                found |= {name: b64decode(value)[: MAX_VALUE_BYTES + 1] for name, value in names if name is not None}
            most = min(_PAGE, max(1, 2 * most))
            more = page.more and bool(page.kvs)
            if more:
                first = b64decode(page.kvs[-1].key) + b"\0"
        return dict(islice(found.items(), limit))

    async def changes(self, prefix: str) -> AsyncGenerator[None, None]:
        """See :meth:`netloader.discovery.store.LeaseStore.changes`. It also tells that a name has expired."""
        async with aclosing(self._gateway.watch(prefix, _after(prefix))) as changes:
            async for _ in changes:
                yield

    async def _transaction(self, compare: dict[str, str], *then: dict[str, Any]) -> _Transaction:
        return await self._gateway.call("kv/txn", {"compare": [compare], "success": then}, _Transaction)

    async def _grant(self, seconds: int) -> str:
        return (await self._gateway.call("lease/grant", {"TTL": seconds}, _Granted)).lease

    async def _prolong(self, lease: str) -> bool:
        """Let a lease last as long again as it was granted for. False if it has ended."""
        kept = await self._gateway.call("lease/keepalive", {"ID": lease}, _KeptAlive)
        return int(kept.result.ttl) > 0

    async def _granted(self, name: str, lease: str) -> int:
        """How many seconds were asked for; of a lease that others gave the name, how many they got."""
        ours, seconds = self._leases.get(name, (_NO_LEASE, 0))
        if lease == _NO_LEASE:
            return 0
        if lease == ours:
            return seconds
        return int((await self._gateway.call("lease/timetolive", {"ID": lease}, _Lasts)).granted)


def _is(name: str, target: str, **expected: str) -> dict[str, str]:
    """A comparison of one field of a name."""
    return {"key": encoded(name), "target": target, "result": "EQUAL", **expected}


def _put(name: str, value: bytes, lease: str) -> dict[str, str]:
    return {"key": encoded(name), "value": encoded(value), "lease": lease}


def _after(prefix: str) -> str:
    """The first name behind all that begin with `prefix`."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else "\0"
