"""etcd's HTTP gateway: one call at any of several members, and a watch. What both need of HTTP, TLS and users.

The gateway is part of etcd since 3.0 and speaks JSON; paths that begin with ``/v3`` are there since 3.4.
"""

from __future__ import annotations

import socket
import ssl
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from typing import Any, TypeVar

import aiohttp
import anyio
import anyio.to_thread
import msgspec

from netloader.discovery.etcd_store import PASSWORD
from netloader.discovery.registry_urls import RegistryUrl
from netloader.errors import DiscoveryError, legible

__all__ = ["EtcdGateway", "EtcdRefusal", "LongAnswer", "encoded"]

T = TypeVar("T")

_CONNECT = 1.5
"""Seconds that connecting to one member may take, so that a call can try another one."""

_CLOSE = 2.0
_AT_ONCE = 4
"""Calls that run at the same time."""

_MOST = 4 << 20
"""Most bytes of an answer; 256 names with the longest values that are written have less than 3 MiB."""

_LINE = 16 << 10
"""Bytes of a line of a watch that are looked at. What does not tell of changes is shorter."""

_UNAVAILABLE = 14
_UNAUTHENTICATED = 16
_DENIED = 7
_GATEWAY_OFF = 404

_REACH = "check that etcd runs and can be reached from this host"
_LOGIN = f"check the user and the password: in the URL (percent-encoded), or the password in {PASSWORD}"
_FILES = "check ca= (and cert=, key=), and that the certificate of each member names its host"


class EtcdRefusal(DiscoveryError):
    """etcd answered with an error.

    Args:
        message: What etcd says.
        code: Its gRPC status.
        hint: What to do.
    """

    def __init__(self, message: str, *, code: int, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.code = code


class LongAnswer(DiscoveryError):
    """An answer has more bytes than are read."""


class _Said(msgspec.Struct):
    """An error, as the gateways of all releases say it."""

    code: int = 0
    message: str = ""
    error: str = ""


class _Token(msgspec.Struct):
    token: str


class _Watched(msgspec.Struct):
    created: bool = False
    canceled: bool = False
    cancel_reason: str = ""


class _Line(msgspec.Struct):
    result: _Watched = msgspec.field(default_factory=_Watched)
    error: _Said | None = None


def encoded(value: str | bytes) -> str:
    """Bytes as the gateway's JSON has them."""
    return b64encode(value.encode() if isinstance(value, str) else value).decode()


class EtcdGateway:
    """Calls to the members of one etcd. A member that can't be reached is passed over.

    Args:
        url: Which members, and who asks.
        deadline: Seconds that a call may take.
    """

    def __init__(self, url: RegistryUrl, deadline: float) -> None:
        self._url = url
        self._deadline = deadline
        self._bases = [f"{'https' if url.scheme == 'etcds' else 'http'}://{host}" for host in url.hosts]
        self._session: aiohttp.ClientSession | None = None
        self._token: str | None = None
        self._opening = anyio.Lock()
        self._turns = anyio.Semaphore(_AT_ONCE)

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            with anyio.move_on_after(_CLOSE, shield=True):
                await self._session.close()

    async def call(self, path: str, body: Mapping[str, Any], answer: type[T]) -> T:
        """Send `body` to a member, and read its answer.

        Another member is asked only if the request was not sent: a request that is sent twice may be answered by what
        the first one did.

        Raises:
            EtcdRefusal: etcd answered with an error.
            LongAnswer: The answer has more than 4 MiB.
            DiscoveryError: No member can be reached, or none answers within the deadline.
        """
        try:
            with anyio.fail_after(self._deadline):
                async with self._turns:
                    return await self._call(path, body, answer)
        except TimeoutError as error:
            raise self._late() from error

    async def _call(self, path: str, body: Mapping[str, Any], answer: type[T]) -> T:
        for last in (False, True):
            token = self._token
            try:
                async with self._post(path, body) as response:
                    return self._read(await _all(response), answer)
            except EtcdRefusal as error:
                if last or not self._url.user or not _forgot(error):
                    raise
                if self._token == token:  # otherwise another call has logged in meanwhile
                    await self._log_in()
        raise DiscoveryError(f"{self._url.shown} refuses each log-in", hint=_LOGIN)

    async def watch(self, prefix: str, end: str) -> AsyncGenerator[None, None]:
        """Yield when etcd has accepted a watch of the names from `prefix` to `end`, and after each change.

        Raises:
            DiscoveryError: The watch was refused, or has ended.
        """
        body = {"create_request": {"key": encoded(prefix), "range_end": encoded(end)}}
        # A member that has lost the others ends the watch. Otherwise it would stay silent.
        headers = {"Grpc-Metadata-hasleader": "true"}
        async with AsyncExitStack() as stack:
            try:
                with anyio.fail_after(self._deadline):
                    response = await stack.enter_async_context(self._post("watch", body, headers))
                    lines = await stack.enter_async_context(aclosing(_lines(response)))
                    first = await anext(lines, b"{}")
            except TimeoutError as error:
                raise self._late() from error
            if not self._is_told(first).created:
                raise DiscoveryError(f"{self._url.shown} accepts no watch: {legible(first.decode(), 200)}", hint=_REACH)
            yield
            async for line in lines:
                self._is_told(line)
                yield
        raise DiscoveryError(f"{self._url.shown} has ended a watch", hint=_REACH)

    def _is_told(self, line: bytes) -> _Watched:
        if len(line) >= _LINE:
            return _Watched()
        said = self._read(line, _Line)
        if said.error is not None:
            raise self._refusal(said.error)
        if said.result.canceled:
            self._token = None  # it may have ended
            raise DiscoveryError(
                f"{self._url.shown} has ended a watch: {legible(said.result.cancel_reason, 200)}", hint=_allow()
            )
        return said.result

    @asynccontextmanager
    async def _post(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer of the first member that can be connected to, if it is no error."""
        session = await self._open()
        if self._url.user and self._token is None and path != "auth/authenticate":
            await self._log_in()
        sent = {**(headers or {}), **({"Authorization": self._token} if self._token else {})}
        async with self._connected(session, path, body, sent) as response:
            if response.status != 200:  # noqa: PLR2004 - OK
                data = await _all(response)
                if response.status == _GATEWAY_OFF:
                    raise DiscoveryError(
                        f"{self._url.shown} has no /v3 gateway",
                        hint="etcd 3.4 or newer is needed, with --enable-grpc-gateway (its default)",
                    )
                raise self._refusal(self._read(data, _Said))
            yield response

    @asynccontextmanager
    async def _connected(
        self, session: aiohttp.ClientSession, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        data = msgspec.json.encode(body)
        with self._translated():
            for _ in self._bases[1:]:
                try:
                    response = await session.post(f"{self._bases[0]}/v3/{path}", data=data, headers=headers)
                    break
                except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
                    self._next()
            else:
                response = await session.post(f"{self._bases[0]}/v3/{path}", data=data, headers=headers)
            async with response:
                yield response

    async def _log_in(self) -> None:
        self._token = None
        body = {"name": self._url.user, "password": self._url.password}
        async with self._post("auth/authenticate", body) as response:
            self._token = self._read(await _all(response), _Token).token

    async def _open(self) -> aiohttp.ClientSession:
        async with self._opening:
            if self._session is None:
                with self._translated():
                    context = await anyio.to_thread.run_sync(_context, self._url.tls)
                self._session = aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(limit=0, ssl=context, socket_factory=_socket),
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT),
                    cookie_jar=aiohttp.DummyCookieJar(),
                )
            return self._session

    def _late(self) -> DiscoveryError:
        self._next()
        return DiscoveryError(f"{self._url.shown} does not answer within {self._deadline:g} s", hint=_REACH)

    def _next(self) -> None:
        """From now on ask another member first."""
        self._bases.append(self._bases.pop(0))

    def _read(self, data: bytes, answer: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=answer)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise DiscoveryError(
                f"{self._url.shown} does not answer as etcd does: {error}", hint="check its address"
            ) from error

    def _refusal(self, said: _Said) -> EtcdRefusal:
        if said.code == _UNAVAILABLE:
            self._next()
        text = said.message or said.error
        hint = {_DENIED: _allow(), _UNAVAILABLE: _REACH}.get(said.code, _REACH)
        if "authentication" in text or "auth token" in text or "user name" in text or "password" in text:
            hint = _LOGIN
        elif "space exceeded" in text:
            hint = "etcd is full: compact and defragment it, then disarm the alarm (etcdctl alarm disarm)"
        return EtcdRefusal(f"{self._url.shown}: {legible(text, 300)}", code=said.code, hint=hint)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise errors of aiohttp and of the system as `DiscoveryError` with a hint."""
        try:
            yield
        except (aiohttp.ClientSSLError, ssl.SSLError) as error:
            raise DiscoveryError(f"{self._url.shown}: {error}", hint=_FILES) from error
        except (aiohttp.ClientError, OSError) as error:
            if not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
                self._next()
            ours = "SSL" in str(error) or isinstance(error, FileNotFoundError | PermissionError)
            hint = _FILES if ours else _REACH
            raise DiscoveryError(f"{self._url.shown}: {str(error) or type(error).__name__}", hint=hint) from error


def _forgot(error: EtcdRefusal) -> bool:
    """Whether etcd does not know our token any more. It has done nothing then."""
    return error.code == _UNAUTHENTICATED or "revision of auth store is old" in str(error)


def _allow() -> str:
    return "allow the user to read and write the prefix (docs/registries.md)"


def _context(files: Mapping[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=files.get("ca"))
    if "cert" in files:
        context.load_cert_chain(files["cert"], files.get("key"))
    return context


def _socket(info: Sequence[Any]) -> socket.socket:
    """A socket whose peer is asked now and then whether it is there: a watch may be silent for hours."""
    made = socket.socket(*info[:3])
    for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return made


async def _all(response: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    async for chunk in response.content.iter_any():
        data += chunk
        if len(data) > _MOST:
            raise LongAnswer(f"an answer of etcd has more than {_MOST} bytes", hint="use another prefix")
    return bytes(data)


async def _lines(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    """The lines of an answer that does not end, each without what is beyond its first :data:`_LINE` bytes."""
    line = b""
    async for chunk in response.content.iter_any():
        *whole, rest = (line + chunk).split(b"\n")
        for each in whole:
            yield each[:_LINE]
        line = rest[:_LINE]
