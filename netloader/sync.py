"""The synchronous API: the library for code without an event loop.

Each call and each server runs an event loop of its own in a named thread, which ends with it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from netloader import api
from netloader.api import Sources, Wanted
from netloader.client.probe import Probe
from netloader.core.addresses import Address
from netloader.core.identity import Layout, ModelIdentity, Role
from netloader.core.report import ProgressCallback, PullReport
from netloader.discovery.argument import Discovery
from netloader.errors import shortage
from netloader.observe.base import Observer
from netloader.server.own_loop import refuse_to_block
from netloader.server.server import HoldingServer

if TYPE_CHECKING:
    import torch

    from netloader.tensors import Allocate

__all__ = ["SyncServer", "probe", "pull", "pull_new", "serve"]

R = TypeVar("R")

_LOOP_START = 10.0
"""Seconds that a thread may take to start its event loop."""

_LOOP_END = 120.0
"""Seconds that the event loop of a call may take to end after the call ended or was interrupted. Its sessions close
their channels in this time; each has a shorter deadline."""

_log = logging.getLogger("netloader")


def pull(
    tensors: Mapping[str, torch.Tensor],
    identity: ModelIdentity | None = None,
    *,
    sources: Sources | None = None,
    transport: Wanted = "auto",
    timeout: float | None = 1200.0,
    wait: float = 0.0,
    stall_timeout: float = 30.0,
    token: bytes | None = None,
    expect_root: str | None = None,
    progress: ProgressCallback | None = None,
    stripe: int = 4,
    follow: bool = True,
    relay: HoldingServer | None = None,
    observers: Sequence[Observer] = (),
    discovery: Discovery = None,
    zone: str | None = None,
) -> PullReport:
    """:func:`netloader.pull`, waiting for its result. Same arguments, result and errors.

    Raises:
        LocalProtocolError: A source is a server of an event loop of this thread, which this call would block.
    """
    refuse_to_block(sources, "pull")
    call = partial(
        api.pull,
        tensors,
        identity,
        sources=sources,
        transport=transport,
        timeout=timeout,
        wait=wait,
        stall_timeout=stall_timeout,
        token=token,
        expect_root=expect_root,
        progress=progress,
        stripe=stripe,
        follow=follow,
        relay=relay,
        observers=observers,
        discovery=discovery,
        zone=zone,
    )
    return wait_for(call, "netloader-pull")


def pull_new(
    *,
    sources: Sources | None = None,
    identity: ModelIdentity | None = None,
    role: Role = "target",
    layouts: Sequence[Layout] = ("checkpoint", "raw", "processed"),
    device: str = "cpu",
    transport: Wanted = "auto",
    timeout: float | None = 1200.0,
    wait: float = 0.0,
    stall_timeout: float = 30.0,
    token: bytes | None = None,
    expect_root: str | None = None,
    max_bytes: int = 1 << 44,
    allocate: Allocate | None = None,
    progress: ProgressCallback | None = None,
    observers: Sequence[Observer] = (),
    discovery: Discovery = None,
    zone: str | None = None,
) -> tuple[Mapping[str, torch.Tensor], PullReport]:
    """:func:`netloader.pull_new`, waiting for its result. Same arguments, result and errors, and :func:`pull`'s."""
    refuse_to_block(sources, "pull_new")
    call = partial(
        api.pull_new,
        sources=sources,
        identity=identity,
        role=role,
        layouts=layouts,
        device=device,
        transport=transport,
        timeout=timeout,
        wait=wait,
        stall_timeout=stall_timeout,
        token=token,
        expect_root=expect_root,
        max_bytes=max_bytes,
        allocate=allocate,
        progress=progress,
        observers=observers,
        discovery=discovery,
        zone=zone,
    )
    return wait_for(call, "netloader-pull")


def probe(
    source: str | Address,
    identity: ModelIdentity | None = None,
    *,
    role: Role = "target",
    layouts: Sequence[Layout] = ("raw", "processed", "checkpoint"),
    timeout: float = 30.0,
    token: bytes | None = None,
) -> Probe:
    """:func:`netloader.probe`, waiting for its result. Same arguments, result and errors, and :func:`pull`'s."""
    refuse_to_block((source,), "probe")
    call = partial(api.probe, source, identity, role=role, layouts=layouts, timeout=timeout, token=token)
    return wait_for(call, "netloader-probe")


class SyncServer:
    """A running server, for code without an event loop. Made by :func:`serve`."""

    def __init__(self, server: api.Server, portal: BlockingPortal) -> None:
        self._server = server
        self._portal = portal

    @property
    def address(self) -> Address:
        """An address at which other hosts may reach it."""
        return self._server.address

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._server.port

    def hold(
        self, tensors: Mapping[str, torch.Tensor], identity: ModelIdentity | None = None, *, weak: bool = False
    ) -> str:
        """:meth:`netloader.Server.hold`, waiting for its result."""
        return self._portal.call(partial(self._server.hold, tensors, identity, weak=weak))

    def retract(
        self, role: Role = "target", *, reason: str, within: float = 5.0, sources: tuple[str, ...] = ()
    ) -> None:
        """:meth:`netloader.Server.retract`, waiting for its result."""
        self._portal.call(partial(self._server.retract, role, reason=reason, within=within, sources=sources))


@contextmanager
def serve(
    tensors: Mapping[str, torch.Tensor] | None = None,
    identity: ModelIdentity | None = None,
    *,
    host: str | None = None,
    port: int = 0,
    transport: Wanted = "auto",
    token: bytes | None = None,
    max_clients: int = 8,
    max_bandwidth: float | str | None = None,
    fan_out: int = 1,
    stall_timeout: float = 30.0,
    device: str = "cpu",
    observers: Sequence[Observer] = (),
    discovery: Discovery = None,
    zone: str | None = None,
) -> Iterator[SyncServer]:
    """Serve tensors until the block ends. Arguments and errors as for :class:`netloader.Server`."""
    made = api.Server(
        tensors,
        identity,
        host=host,
        port=port,
        transport=transport,
        token=token,
        max_clients=max_clients,
        max_bandwidth=max_bandwidth,
        fan_out=fan_out,
        stall_timeout=stall_timeout,
        device=device,
        observers=observers,
        discovery=discovery,
        zone=zone,
    )
    with (
        start_blocking_portal(name="netloader-server") as portal,
        portal.wrap_async_context_manager(made) as server,
    ):
        yield SyncServer(server, portal)


def wait_for(call: Callable[[], Awaitable[R]], name: str) -> R:
    """Run `call` in an event loop and a thread of its own, and wait for both to end. An interrupt cancels it.

    A blocking portal is made for a loop that stays, and would take a millisecond longer.
    """
    calls = [call]  # its arguments are the caller's: no frame or function keeps them, since the loop may keep those
    del call
    outcome: list[R] = []
    failure: list[BaseException] = []
    over = threading.Event()
    running: Future[Callable[[], object]] = Future()

    async def cancellable() -> None:
        loop = asyncio.get_running_loop()
        with anyio.CancelScope() as scope:
            running.set_result(lambda: loop.call_soon_threadsafe(scope.cancel))
            try:
                outcome.append(await calls.pop()())
            except Exception as error:  # noqa: BLE001 - raised in the waiting thread
                # Not through the loop: its task and the frames in the traceback would keep each other.
                failure.append(error)

    def run() -> None:
        try:
            anyio.run(cancellable)
        except BaseException as error:  # noqa: BLE001 - raised in the waiting thread
            failure.append(error)
        finally:
            over.set()
            if not running.done():  # the event loop did not start: there is nothing to cancel
                running.set_result(lambda: None)

    thread = threading.Thread(target=run, name=name, daemon=True)
    try:
        thread.start()  # an interrupt may arrive here when the call has begun already
        over.wait()
    except RuntimeError as error:  # no thread was started
        if (scarce := shortage(error)) is None:
            raise
        raise scarce from error
    except BaseException:
        with suppress(RuntimeError, TimeoutError):  # the loop has just ended, or never started
            running.result(_LOOP_START)()
        raise
    finally:
        if thread.ident is not None:
            thread.join(_LOOP_END)
        if thread.is_alive():
            _log.error("thread %s did not end within %g s after its call", name, _LOOP_END)
    if failure:
        raise failure.pop()
    return outcome.pop()
