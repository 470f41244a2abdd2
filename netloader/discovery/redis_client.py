"""A registry in Redis or Valkey: one server, a master that Sentinel names, or a cluster.

Each name is one key that Redis itself lets expire. Beside the keys stand two sorted sets: all names in alphabetical
order, so that a prefix is read without looking at anything else in the database, and when each of them ends, so that
names of dead servers leave the first set too. What belongs together is changed by one script, in one step. All keys
have one hash tag (the first part of their names), so in a cluster all of them are in one slot.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from itertools import islice
from typing import Any, TypeVar

import anyio
import redis.exceptions as errors
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import NoBackoff

from netloader.core.addresses import Address
from netloader.discovery.redis_store import PASSWORD
from netloader.discovery.registry_urls import RegistryUrl
from netloader.discovery.store import MAX_VALUE_BYTES, text_of
from netloader.errors import DiscoveryError, LocalProtocolError

__all__ = ["RedisClients", "RedisStore"]

T = TypeVar("T")

_SENTINEL_PASSWORD = "NETLOADER_REDIS_SENTINEL_PASSWORD"  # noqa: S105 - the name of a variable

_CONNECT = 2.0
"""Seconds that connecting may take, so that a call can try another Sentinel."""

_CLOSE = 2.0
_QUIET = 5.0
"""Seconds without a message after which a listening connection is asked whether it lives."""

_AT_ONCE = 4
"""Calls of one store that run at the same time, each on a connection of its own."""

_PAGE = 256
"""Names that are read in one step: their values are parsed without giving others the event loop."""

_WRITE = """
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now - 60000, 'LIMIT', 0, 16)) do
    redis.call('ZREM', KEYS[2], name)
    redis.call('ZREM', KEYS[3], name)
end
redis.call('ZADD', KEYS[2], 0, ARGV[1])
redis.call('ZADD', KEYS[3], now + ARGV[3], ARGV[1])
for i = 2, 3 do
    if redis.call('PTTL', KEYS[i]) < ARGV[3] + 60000 then
        redis.call('PEXPIRE', KEYS[i], ARGV[3] + 120000)
    end
end
"""
_TELL = """
local at = string.find(KEYS[1], '/', 1, true)
while at do
    redis.call('PUBLISH', string.sub(KEYS[1], 1, at), '')
    at = string.find(KEYS[1], '/', at + 1, true)
end
"""
"""Each folder of the name is a channel. Patterns of channels can't be allowed to a user without allowing all."""

_PUT = f"redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])\n{_TELL}"
_PUT_SCRIPT = _PUT + _WRITE
_CREATE_SCRIPT = f"if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end\n{_PUT}{_WRITE}return 1"
_RENEW_SCRIPT = f"""
if redis.call('GET', KEYS[1]) ~= ARGV[2] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
{_WRITE}
return 1
"""
_REMOVE_SCRIPT = f"""
if redis.call('GET', KEYS[1]) ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
{_TELL}
return 1
"""
"""KEYS: of the name, the names in order, when they end. ARGV: the name, the value, the lease in milliseconds."""

_READ_SCRIPT = """
local found = {}
for i, key in ipairs(KEYS) do
    local value = redis.pcall('GETRANGE', key, 0, ARGV[1])
    if type(value) == 'table' then
        if not string.find(value.err, 'WRONGTYPE', 1, true) then return value end
        value = false
    elseif value == '' and redis.call('EXISTS', key) == 0 then
        value = false
    end
    found[i] = value
end
return found
"""
"""The values of the keys, each without what is beyond the last byte that ARGV names. Others may write there too."""

_Client = Redis | RedisCluster


class RedisClients:
    """Makes connections to what a URL names.

    Args:
        url: What the URL says.
        kind: ``sentinel``, ``cluster``, or empty for one server.
        db: Number of the database.
        deadline: Seconds that a call may take.
    """

    def __init__(self, url: RegistryUrl, kind: str, db: int, deadline: float) -> None:
        self._url = url
        self._kind = kind
        self._db = db
        self._deadline = deadline

    @asynccontextmanager
    async def open(self) -> AsyncIterator[RedisStore]:
        """Open a connection. The first call connects."""
        async with AsyncExitStack() as stack:
            client = self._client(stack)
            stack.push_async_callback(_close, client)
            yield RedisStore(client, self._url.shown, self._deadline, self._server)

    def _client(self, stack: AsyncExitStack) -> _Client:
        """A client of redis-py that has not connected yet. `stack` closes what it uses besides."""
        hosts = self._url.hosts
        if self._kind == "cluster":
            nodes = [ClusterNode(host.host, host.port) for host in hosts]
            return RedisCluster(startup_nodes=nodes, require_full_coverage=False, **self._options())
        if self._kind == "sentinel":
            # What the Sentinels are asked with: their password is their own.
            theirs = {**self._options(), "username": None, "password": self._sentinel_password()}
            sentinel: Any = Sentinel([(host.host, host.port) for host in hosts], sentinel_kwargs=theirs)  # type: ignore[no-untyped-call]
            for each in sentinel.sentinels:
                stack.push_async_callback(_close, each)
            master: Redis = sentinel.master_for(
                self._url.options["service"], redis_class=Redis, db=self._db, **self._options()
            )
            return master
        return self._server(hosts[0])

    def _server(self, host: Address) -> Redis:
        return Redis(host=host.host, port=host.port, db=self._db, **self._options())

    def _sentinel_password(self) -> str | None:
        return self._url.options.get("sentinel_password") or os.environ.get(_SENTINEL_PASSWORD) or None

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "username": self._url.user or None,
            "password": self._url.password or None,
            "socket_timeout": self._deadline,
            "socket_connect_timeout": _CONNECT,
            "socket_keepalive": True,
            "protocol": 2,  # what Redis 5 speaks too
            "driver_info": None,  # otherwise files are read to find a version, on the event loop
            # A call that is sent twice may be answered by what the first one did.
            "retry": Retry(NoBackoff(), 0),
        }
        if self._url.scheme.startswith("rediss"):
            files = {"ca": "ssl_ca_certs", "cert": "ssl_certfile", "key": "ssl_keyfile"}
            options |= {"ssl": True, **{files[name]: file for name, file in self._url.tls.items()}}
        return options


class RedisStore:
    """A connection to Redis or Valkey. A `LeaseStore`.

    A prefix that is read or watched has at least the first slash of the names: it decides where in a cluster they are.

    Args:
        client: Of redis-py.
        name: Of the registry, for errors: a URL without its password.
        deadline: Seconds that a call may take.
        connect_to: Connects to one node of a cluster.
    """

    def __init__(self, client: _Client, name: str, deadline: float, connect_to: Callable[[Address], Redis]) -> None:
        self._client: Any = client
        self._name = name
        self._deadline = deadline
        self._connect_to = connect_to
        self._turns = anyio.Semaphore(_AT_ONCE)

    async def put(self, name: str, value: bytes, *, ttl: float) -> None:
        """See :meth:`netloader.discovery.store.LeaseStore.put`."""
        await self._script(_PUT_SCRIPT, name, value, ttl)

    async def create(self, name: str, value: bytes, *, ttl: float) -> bool:
        """See :meth:`netloader.discovery.store.LeaseStore.create`."""
        return bool(await self._script(_CREATE_SCRIPT, name, value, ttl))

    async def renew(self, name: str, value: bytes, *, ttl: float) -> bool:
        """See :meth:`netloader.discovery.store.LeaseStore.renew`."""
        return bool(await self._script(_RENEW_SCRIPT, name, value, ttl))

    async def remove(self, name: str, value: bytes) -> bool:
        """See :meth:`netloader.discovery.store.LeaseStore.remove`."""
        return bool(await self._script(_REMOVE_SCRIPT, name, value, 0))

    async def read(self, prefix: str, *, limit: int) -> Mapping[str, bytes]:
        """See :meth:`netloader.discovery.store.LeaseStore.read`."""
        return await self._ask(lambda: self._read(prefix, limit))

    async def changes(self, prefix: str) -> AsyncGenerator[None, None]:
        """See :meth:`netloader.discovery.store.LeaseStore.changes`. It does not tell that a name has expired."""
        async with AsyncExitStack() as stack:
            listening = await self._ask(lambda: self._listen(stack, _key(prefix).rpartition("/")[0] + "/"))
            yield
            while True:
                await self._message(listening)
                yield

    async def _script(self, script: str, name: str, value: bytes, ttl: float) -> Any:
        # EVAL and not EVALSHA: a server that was restarted does not know the digest, and the scripts are short.
        key, tag = _key(name), _tag(name)
        milliseconds = int(-(-ttl * 1000 // 1))
        arguments = (key, f"{tag}:names", f"{tag}:ends", name, value, milliseconds)
        return await self._ask(lambda: self._client.eval(script, 3, *arguments))

    async def _read(self, prefix: str, limit: int) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        index, first, end = f"{_tag(prefix)}:names", f"[{prefix}".encode(), f"({prefix}\x7f"
        while len(found) < limit:
            page = await self._client.zrangebylex(index, first, end, 0, _PAGE)
            if not page:
                break
            first = b"(" + page[-1]
            names = [name for each in page if (name := text_of(each)) is not None]
            keys = [_key(name) for name in names]
            # The last byte that is read is the first that no value of ours has: what is too long stays so.
            values = await self._client.eval(_READ_SCRIPT, len(keys), *keys, MAX_VALUE_BYTES) if keys else []
            found |= {name: value for name, value in zip(names, values, strict=True) if value is not None}
        return dict(islice(found.items(), limit))

    async def _listen(self, stack: AsyncExitStack, channel: str) -> Any:
        """A connection on which Redis has confirmed that it tells what is published. `stack` closes it."""
        client = self._client
        if isinstance(client, RedisCluster):
            # Every node of a cluster tells what is published at any of them.
            await client.initialize()
            node: Any = client.get_random_node()
            client = self._connect_to(Address(node.host, node.port))
            stack.push_async_callback(_close, client)
        listening = client.pubsub()
        stack.push_async_callback(_close, listening)
        await listening.subscribe(channel)
        while (await listening.get_message(timeout=self._deadline) or {}).get("type") != "subscribe":
            pass
        return listening

    async def _message(self, listening: Any) -> None:
        """Wait until something is told. A connection that stays silent is asked whether it lives."""
        asked = False
        with _translated(self._name):
            while True:
                message = await listening.get_message(timeout=_QUIET)
                if message is not None and message["type"] == "message":
                    return
                if message is None and asked:
                    raise DiscoveryError(f"{self._name} does not answer within {_QUIET:g} s", hint=_REACH)
                asked = message is None
                if asked:
                    await listening.ping()

    async def _ask(self, call: Callable[[], Awaitable[T]]) -> T:
        with _translated(self._name):
            try:
                with anyio.fail_after(self._deadline):
                    async with self._turns:
                        return await call()
            except TimeoutError as error:
                raise DiscoveryError(
                    f"{self._name} does not answer within {self._deadline:g} s", hint=_REACH
                ) from error


async def _close(thing: Any) -> None:
    with anyio.move_on_after(_CLOSE, shield=True):
        await thing.aclose()


def _tag(name: str) -> str:
    """The hash tag of a name. All names of one prefix are in one slot of a cluster.

    Raises:
        LocalProtocolError: `name` is a prefix without a slash, which may be that of several slots.
    """
    first, slash, _ = name.partition("/")
    if not slash or not first:
        raise LocalProtocolError(f"the name {name!r} has no slash after its first part")
    return f"{{{first}}}"


def _key(name: str) -> str:
    return f"{_tag(name)}/{name.partition('/')[2]}"


_REACH = "check that it runs and can be reached from this host"

_HINTS: tuple[tuple[type[Exception], str], ...] = (
    (
        errors.AuthenticationError,
        f"check the user and the password: in the URL (percent-encoded), or the password in {PASSWORD}",
    ),
    (errors.NoPermissionError, "allow the user what docs/registries.md lists (ACL SETUSER)"),
    (errors.ReadOnlyError, "this is a replica: name the master, or let Sentinel name it (redis+sentinel://)"),
    (errors.OutOfMemoryError, "raise its maxmemory, or choose an eviction policy (maxmemory-policy)"),
    (MasterNotFoundError, "check service=, and that the Sentinels reach a majority and the master"),
    (errors.ClusterDownError, "the cluster has lost a part of its slots: check its nodes (CLUSTER INFO)"),
    (errors.RedisClusterException, "check that these are nodes of a cluster; for one server use redis://"),
    (errors.BusyLoadingError, "it reads its data from disk: this passes"),
    (errors.MovedError, "this is a node of a cluster: use redis+cluster://"),
    (errors.ConnectionError, _REACH),
    (errors.TimeoutError, _REACH),
    (OSError, _REACH),
)


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """Raise errors of redis-py and of the system as `DiscoveryError` with a hint."""
    try:
        yield
    except (errors.RedisError, errors.RedisClusterException, OSError) as error:
        text = str(error)
        hint = next((hint for kind, hint in _HINTS if isinstance(error, kind)), _REACH)
        if "NOAUTH" in text or "WRONGPASS" in text:
            hint = _HINTS[0][1]
        elif "CERTIFICATE" in text or "SSL" in text or "certificate" in text or "No such file" in text:
            hint = "check ca= (and cert=, key=), and that the server's certificate names this host"
        raise DiscoveryError(f"{name}: {text or type(error).__name__}", hint=hint) from error
