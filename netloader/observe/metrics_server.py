"""An HTTP server for Prometheus and for probes: ``/metrics``, ``/healthz`` and ``/readyz``."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import TCPServer, ThreadingMixIn
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from netloader.errors import ConfigError, legible, remedy_for

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["MULTIPROCESS", "MetricsServer"]

_log = logging.getLogger("netloader")

MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
"""Where it is set, ``prometheus_client`` shares the metrics of all processes through files in that folder."""

_AT_ONCE = 8
"""Most requests that are answered at once; a stranger may reach this port, too."""

_REQUEST = 5.0
"""Seconds that a request may take from the connection on, however its client delays it."""

_ROOM = 0.5
"""Seconds that a request may take if all threads are busy and another client waits. A probe waits one second."""

_POLL = 0.1
"""Seconds within which :meth:`MetricsServer.close`, a thread that is free and a request that is late are noticed."""

_LINE = 200
"""Most characters of a request that are logged."""

_START = Callable[[str, list[tuple[str, str]]], Any]


class MetricsServer:
    """Answers ``/metrics``, ``/healthz`` and ``/readyz`` in threads of its own, so a busy event loop delays no scrape.

    ``/healthz`` says whether the process answers, ``/readyz`` whether it serves weights: status 200, or 503 with the
    reason.

    Args:
        host: Address to listen at; empty for all.
        port: Port; 0 for a free one.
        registry: What is exposed. With ``PROMETHEUS_MULTIPROC_DIR``, the metrics of all processes that have it.
        ready: Why nothing is served now; empty when something is. It is called in a thread.
        field: How the user named the port, for errors.

    Attributes:
        port: The port that it listens at.

    Raises:
        ConfigError: It can't listen there.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        *,
        ready: Callable[[], str],
        field: str,
    ) -> None:
        self._metrics = _exposition(registry)
        self._ready = ready
        server = _Server6 if ":" in host or (not host and socket.has_dualstack_ipv6()) else _Server
        try:
            self._http = make_server(host or ("::" if server is _Server6 else ""), port, self._answer, server, _Handler)
        except OSError as error:
            raise ConfigError(
                field=field,
                value=port,
                allowed="a port that is free on this host",
                reason=error.strerror or str(error),
                hint=remedy_for(error) or "choose another port",
            ) from error
        self.port = self._http.server_port
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(_POLL,), name="netloader-metrics", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        """The server itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the server."""
        self.close()

    def close(self) -> None:
        """Stop listening, and wait for the thread that does. Requests that are complete are answered. Idempotent."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _answer(self, environ: dict[str, Any], start: _START) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return self._metrics(environ, start)
        if path == "/healthz":
            return _text(start, "200 OK", "ok")
        if path == "/readyz":
            why = self._ready()
            return _text(start, "503 Service Unavailable" if why else "200 OK", why or "ready")
        return _text(start, "404 Not Found", "there are /metrics, /healthz and /readyz")


def _text(start: _START, status: str, body: str) -> Iterable[bytes]:
    start(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{body}\n".encode()]


def _exposition(registry: CollectorRegistry) -> Callable[[dict[str, Any], _START], Iterable[bytes]]:
    import prometheus_client as prometheus

    shown = registry
    if MULTIPROCESS in os.environ:
        from prometheus_client.multiprocess import MultiProcessCollector

        shown = prometheus.CollectorRegistry()
        MultiProcessCollector(shown)  # type: ignore[no-untyped-call]
    return prometheus.make_wsgi_app(shown)


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST  # type: ignore[mutable-override]

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the base's
        """Requests are logged at debug level only: there is one every few seconds."""
        _log.debug("metrics: %s", legible(format % args, _LINE))


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *args: Any) -> None:
        self._room = threading.BoundedSemaphore(_AT_ONCE)
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}  # when each connection was accepted; the oldest is the first
        super().__init__(*args)

    def server_bind(self) -> None:
        """Bind without a look-up of the host's name, which may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread. If none is free soon, the request that has taken longest is ended to make room."""
        until = time.monotonic() + 2 * _ROOM
        while not self._room.acquire(timeout=_POLL):
            self._end_oldest(_ROOM)
            if time.monotonic() >= until:  # what holds the threads is not their clients
                self.shutdown_request(request)
                return
        with self._lock:
            self._open[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread can be started
            self._forget(request)
            raise

    def service_actions(self) -> None:
        """Called again and again while requests are accepted: end one that takes too long."""
        self._end_oldest(_REQUEST)

    def server_close(self) -> None:
        """Stop listening, and read no more of any request."""
        super().server_close()
        with self._lock:
            for request in self._open:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RD)

    def _end_oldest(self, seconds: float) -> None:
        """End the request that has taken longest, if that is `seconds` or more. Its thread is free soon after."""
        with self._lock:
            request, began = next(iter(self._open.items()), (None, 0.0))
            if request is None or time.monotonic() - began < seconds:
                return
            del self._open[request]
            with suppress(OSError):  # its client has left
                request.shutdown(socket.SHUT_RDWR)

    def _forget(self, request: socket.socket) -> None:
        with self._lock:
            self._open.pop(request, None)
        self._room.release()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and make room for the next request."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the signature is the base's
        """A client that left amid its request is no error of this server."""
        _log.debug("metrics: a request failed", exc_info=True)


class _Server6(_Server):
    address_family: int = socket.AF_INET6

    def server_bind(self) -> None:
        """Bind for IPv4 clients too, where all addresses are meant."""
        if self.server_address[0] == "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()
