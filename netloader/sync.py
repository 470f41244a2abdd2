"""The synchronous face: the same library for code without an event loop.

Each call, and each server, has an event loop of its own in a named background thread that ends with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from anyio.from_thread import BlockingPortal, start_blocking_portal

from netloader import library
from netloader.probing import Probe
from netloader.report import PullReport

if TYPE_CHECKING:
    import torch

__all__ = ["SyncServer", "probe", "pull", "pull_new", "serve"]


def pull(tensors: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any) -> PullReport:
    """:func:`netloader.pull`, waiting for its result. Same arguments, result and errors."""
    with start_blocking_portal(name="netloader-pull") as portal:
        return portal.call(partial(library.pull, tensors, *args, **kwargs))


def pull_new(**kwargs: Any) -> tuple[Mapping[str, torch.Tensor], PullReport]:
    """:func:`netloader.pull_new`, waiting for its result. Same arguments, result and errors."""
    with start_blocking_portal(name="netloader-pull") as portal:
        return portal.call(partial(library.pull_new, **kwargs))


def probe(*args: Any, **kwargs: Any) -> Probe:
    """:func:`netloader.probe`, waiting for its result. Same arguments, result and errors."""
    with start_blocking_portal(name="netloader-probe") as portal:
        return portal.call(partial(library.probe, *args, **kwargs))


class SyncServer:
    """A running server, seen from code without an event loop. Made by :func:`serve`."""

    def __init__(self, server: library.Server, portal: BlockingPortal) -> None:
        self._server = server
        self._portal = portal

    @property
    def address(self) -> str:
        """An address under which others may reach it (``host:port``)."""
        return str(self._server.address)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._server.port

    def hold(self, *args: Any, **kwargs: Any) -> str:
        """:meth:`netloader.Server.hold`, waiting for its result."""
        return self._portal.call(partial(self._server.hold, *args, **kwargs))

    def retract(self, *args: Any, **kwargs: Any) -> None:
        """:meth:`netloader.Server.retract`, waiting for its result."""
        self._portal.call(partial(self._server.retract, *args, **kwargs))


@contextmanager
def serve(*args: Any, **kwargs: Any) -> Iterator[SyncServer]:
    """Serve tensors until the block ends. Arguments and errors as for :class:`netloader.Server`."""
    with (
        start_blocking_portal(name="netloader-server") as portal,
        portal.wrap_async_context_manager(library.Server(*args, **kwargs)) as server,
    ):
        yield SyncServer(server, portal)
