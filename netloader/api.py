"""The public API of the library: serve a mapping of named tensors, and pull into another one.

Importing this module does not import torch; using it does.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self

import anyio.to_thread

from netloader.client.arguments import check_asked, check_identity, check_pull, check_tensors, check_transport
from netloader.client.probe import Probe, probe_source, relay_at
from netloader.client.pull import pull_from
from netloader.config.arguments import Arguments
from netloader.core.addresses import Address, is_loopback, parse_address, parse_host
from netloader.core.identity import Layout, ModelIdentity, Role
from netloader.core.options import PullOptions, ServeOptions, Timings
from netloader.core.report import ProgressCallback, PullReport
from netloader.core.sources import Source
from netloader.core.version import own_version
from netloader.discovery.base import SourceProvider
from netloader.errors import LocalProtocolError, MemoryStillInUse
from netloader.observe.base import Observer
from netloader.observe.logging import PullLog
from netloader.observe.progress import Display
from netloader.server.own_address import own_host
from netloader.server.own_loop import serving_at
from netloader.server.server import HoldingServer
from netloader.session.holding import Holding
from netloader.session.off_loop import FEW_SPANS, in_thread, shielded, weaken
from netloader.session.own_task import OwnTask, in_own_task
from netloader.session.relay_progress import Supply
from netloader.transports import registry
from netloader.transports.base import Transport
from netloader.transports.contract_0_1 import adapted

if TYPE_CHECKING:
    import torch

    from netloader.tensors import Allocate, Destination, TensorHolding

__all__ = ["Server", "own_host", "probe", "pull", "pull_new"]

Wanted = str | Transport | Sequence[str | Transport]
"""Transports to use: ``auto``, a name or an object, or several of them, preferred first."""

Sources = Sequence[str | Address | Source] | SourceProvider
"""Sources to pull from: a list, or a provider that finds them."""

_DAY = 86_400.0

_log = logging.getLogger("netloader")


def software() -> str:
    """Name and version of this software, as peers receive it."""
    return f"netloader {own_version()}"


class Server(HoldingServer):
    """Serves named tensors to clients, as an asynchronous context manager.

    Example: ``async with netloader.Server(model.state_dict(), ModelIdentity(model="m")) as server: ...``

    It may be entered in one task and left in another one of the same event loop, as fixtures of pytest-asyncio do.

    Args:
        tensors: Name -> tensor, on one device. They are served without a copy, so they must not change while they are
            served. None to start without tensors and call :meth:`hold` later.
        identity: Identity of the tensors.
        host: Address to bind; None for all.
        port: Port to bind; 0 for a free one.
        transport: Transports that may be used. ``auto`` leaves out gloo, which is slower than tcp.
        token: Shared secret that clients must know.
        max_clients: Clients served at once; others wait for their turn.
        fan_out: Clients served directly before further ones are redirected to relays; 0 redirects no client.
        stall_timeout: Seconds that a transfer may go without progress before the client is dropped.
        device: Device of the tensors, when none are given yet.
        observers: Receive the events of the server and its sessions (:mod:`netloader.observe`).

    Raises (on entering, but for arguments that are not valid):
        ConfigError: Arguments are not valid, and the message names all of them; or the address cannot be bound.
        ManifestError: Some of the tensors cannot be served; all of them are named.
        TransportUnavailable: No transport can run here.
    """

    _exposed_hint: ClassVar[str] = "pass token=..., or a host=... that only trusted hosts reach"  # in its users' words

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor] | None = None,
        identity: ModelIdentity | None = None,
        *,
        host: str | None = None,
        port: int = 0,
        transport: Wanted = "auto",
        token: bytes | None = None,
        max_clients: int = 8,
        fan_out: int = 1,
        stall_timeout: float = 30.0,
        device: str = "cpu",
        observers: Sequence[Observer] = (),
    ) -> None:
        check = Arguments()
        check_tensors(check, tensors, identity, none=True)
        check.host("host", host)
        check.port("port", port)
        check_transport(check, transport)
        check.token("token", token)
        check.integer("max_clients", max_clients, least=1)
        check.integer("fan_out", fan_out, least=0)
        check.seconds("stall_timeout", stall_timeout, positive=True)
        check.kind("device", device, str, "the name of a device, like cpu or cuda:0")
        check.functions("observers", observers)
        check.raise_all()
        options = ServeOptions(
            host=None if host is None else parse_host(host),
            port=port,
            max_clients=max_clients,
            fan_out=fan_out,
            token=token,
            timings=Timings(stall=stall_timeout),
            software=software(),
        )
        carriers = _transports(_device_of(tensors, device), transport)[0]
        asked = PullOptions(token=token, software=options.software)
        super().__init__(carriers, options, observers=observers, check_relay=partial(relay_at, options=asked))
        self._first = None if tensors is None else (tensors, identity)
        self._warn_if_exposed = token is None
        self._held: list[TensorHolding] = []
        self._own_host = ""
        self._task: OwnTask | None = None

    async def __aenter__(self) -> Self:
        if self._task is not None:
            raise LocalProtocolError("the server was started before", hint="make a new one")
        self._task = OwnTask(self._running(), "the server")
        await self._task.enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is None:
            raise LocalProtocolError("the server is not running")
        await self._task.leave()

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        """Run the server. Its task group needs enter and exit in one task: that of `OwnTask`."""
        await super().__aenter__()
        try:
            self._own_host = await anyio.to_thread.run_sync(own_host, self.host, self._options.host)
            await self._hold_first()
            with serving_at(self.port, self.host, self._own_host):
                yield
        finally:
            try:
                await super().__aexit__(None, None, None)
            finally:
                for holding in self._held:
                    await weaken(holding.memory.weaken, holding.announcement.manifest)

    async def _hold_first(self) -> None:
        first, self._first = self._first, None
        if first is not None:
            await self.hold(*first)

    @property
    def address(self) -> Address:
        """An address at which other hosts may reach this server."""
        return Address(self._own_host, self.port)

    def add(self, holding: Holding, supply: Supply | None = None) -> None:
        """Serve `holding`. The first time, say so if every host may pull it."""
        super().add(holding, supply)
        if self._warn_if_exposed and not is_loopback(self.host):
            self._warn_if_exposed = False
            _log.warning(
                "netloader serves at %s to every host that can reach it, because no token is set (%s)",
                Address(self.host, self.port),
                self._exposed_hint,
            )

    async def hold(
        self, tensors: Mapping[str, torch.Tensor], identity: ModelIdentity | None = None, *, weak: bool = False
    ) -> str:
        """Serve `tensors` under the role and layout of `identity`.

        Describes and hashes them in worker threads.

        Args:
            tensors: Name -> tensor.
            identity: Identity of the tensors.
            weak: Hold only weak references. Blocks of tensors that their owner freed are answered with "gone".

        Returns:
            Their root, in hex.

        Raises:
            ManifestError: Some of them cannot be served; all of those are named.
            LocalProtocolError: Other tensors are served under that role and layout, or the server has ended or runs in
                another event loop.
        """
        from netloader.tensors import hold

        if self._task is not None:
            self._task.check_running()
        make = partial(hold, tensors, identity or ModelIdentity(), weak=weak)
        holding = await in_thread(make)
        self.add(holding)
        self._held.append(holding)
        return holding.announcement.root

    async def retract(
        self, role: Role = "target", *, reason: str, within: float = 5.0, sources: tuple[str, ...] = ()
    ) -> None:
        """Stop serving `role`, as :class:`~netloader.server.server.HoldingServer` does, and let go of its tensors."""
        if self._task is not None:
            self._task.check_loop()
        try:
            await super().retract(role, reason=reason, within=within, sources=sources)
        finally:
            await self._let_go()

    async def _let_go(self) -> None:
        """Hold the tensors of what is not served any more by weak references only."""
        served = self.holdings.held()
        gone = [holding for holding in self._held if not any(holding is one for one in served)]
        self._held = [holding for holding in self._held if all(holding is not one for one in gone)]
        for holding in gone:
            await weaken(holding.memory.weaken, holding.announcement.manifest)


def _device_of(tensors: Mapping[str, torch.Tensor] | None, default: str) -> str:
    return default if not tensors else str(getattr(next(iter(tensors.values())), "device", default))


def _transports(device: str, wanted: Wanted) -> tuple[tuple[Transport, ...], dict[str, str]]:
    """The wanted transports that can run on `device`, and the reasons why others cannot.

    Objects are used as they are; names are looked up in the registry.

    Raises:
        TransportUnavailable: A name is unknown, or none of the wanted transports can run here.
    """
    items = [wanted] if isinstance(wanted, str | Transport) else list(wanted)
    found: list[Transport] = []
    reasons: dict[str, str] = {}
    for item in items:
        if isinstance(item, str):
            available = registry.available(device, item)
            found.extend(available.transports)
            reasons |= available.reasons
        else:
            found.append(adapted(item))
    return tuple(found), reasons


async def pull(
    tensors: Mapping[str, torch.Tensor],
    identity: ModelIdentity | None = None,
    *,
    sources: Sources,
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
) -> PullReport:
    """Fill `tensors` from sources that hold the same ones, and verify every byte.

    Args:
        tensors: Name -> tensor, on one device; filled in place. After an error, any of them may have been written.
        identity: Identity of the tensors, which the source must match. None accepts what the source holds as target.
        sources: Addresses (``host:port``, ``[ipv6]:port``) in the order to try. When a source refuses, is down,
            stalls or fails, the pull continues from the next one and keeps the verified blocks. Or a
            :class:`~netloader.discovery.SourceProvider`, whose sources may appear and vanish during the pull. The pull
            waits until it has listed the available sources (at most 10 seconds), and for `wait` seconds in all.
        transport: Transports that may be used. ``auto`` leaves out gloo, which is slower than tcp.
        timeout: Seconds that the whole pull may take; None means one day.
        wait: Seconds to keep trying sources that are down or answer "not ready" or "busy", and to wait for a provider
            to find one.
        stall_timeout: Seconds without progress after which the pull leaves a source.
        token: Shared secret.
        expect_root: Root that the weights must have, in hex.
        progress: Called after blocks were verified.
        stripe: Sources to pull from at once. The first source that accepts decides the root, before others are asked.
        follow: Follow the redirect of a busy source to a relay.
        relay: A running server of this process. It serves the verified blocks during the pull, and all of them
            afterwards. Retract the role there before the tensors change.
        observers: Receive the events of the pull (:mod:`netloader.observe`).

    Returns:
        The report of the pull.

    Raises:
        NoSourceLeft: The sources could not give every block; the message says why for each source.
        MemoryStillInUse: A thread did not return and may still write to `tensors`. Do not fill them again; end the
            process.
        ManifestError: Some of `tensors` cannot be filled; all of them are named.
        ConfigError: Arguments are not valid; the message names all of them. Nothing was sent.
    """
    check = Arguments()
    check_tensors(check, tensors, identity)
    found = check_pull(check, sources, transport, timeout, wait, stall_timeout, token, expect_root)
    check.function("progress", progress)
    check.integer("stripe", stripe, least=1)
    check.kind("follow", follow, bool, "True or False")
    check.kind("relay", relay, (HoldingServer, type(None)), "a running netloader.Server, or None")
    check.functions("observers", observers)
    check.raise_all()

    from netloader.tensors import destination

    options = PullOptions(
        timeout=_DAY if timeout is None else timeout,
        wait=wait,
        stripe=stripe,
        follow=follow,
        layouts=("raw", "processed", "checkpoint") if identity is None else (identity.layout,),
        token=token,
        expect_root=(expect_root or "").lower(),
        timings=Timings(stall=stall_timeout),
        software=software(),
    )
    few = len(tensors) <= FEW_SPANS  # looked at faster than a thread is started
    filled = destination(tensors) if few else await in_thread(partial(destination, tensors))
    del tensors  # the traceback of an error has this frame
    return (await _pull_into(filled, identity, found, transport, options, progress, observers, relay))[1]


async def pull_new(
    *,
    sources: Sources,
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
) -> tuple[Mapping[str, torch.Tensor], PullReport]:
    """Pull what a source holds into new tensors.

    Args:
        sources: As for :func:`pull`.
        role: Role to ask for.
        layouts: Layouts to accept, preferred first.
        device: Device for the new tensors.
        max_bytes: Largest model to accept, in bytes.
        allocate: Makes the tensors for the manifest (and the metadata) that the source announces, instead of new ones
            in memory: for example :meth:`netloader.checkpoint.OutputFolder.allocate`, whose tensors are views of files.
            Called again for another source if the first one delivers nothing; earlier tensors are not used then.
        transport: As for :func:`pull`.
        timeout: As for :func:`pull`.
        wait: As for :func:`pull`.
        stall_timeout: As for :func:`pull`.
        token: Shared secret.
        expect_root: Root that the weights must have, in hex.
        progress: Called after blocks were verified.
        observers: Receive the events of the pull (:mod:`netloader.observe`).

    Returns:
        Name -> tensor, and the report of the pull.

    Raises:
        NoSourceLeft, MemoryStillInUse, ConfigError: As for :func:`pull`.
    """
    check = Arguments()
    found = check_pull(check, sources, transport, timeout, wait, stall_timeout, token, expect_root)
    check_asked(check, role, layouts)
    check.kind("device", device, str, "the name of a device, like cpu or cuda:0")
    check.integer("max_bytes", max_bytes, least=1)
    check.function("progress", progress)
    check.functions("observers", observers)
    check.raise_all()

    from netloader.tensors import destination

    options = PullOptions(
        timeout=_DAY if timeout is None else timeout,
        wait=wait,
        role=role,
        layouts=tuple(layouts),
        token=token,
        expect_root=(expect_root or "").lower(),
        max_bytes=max_bytes,
        timings=Timings(stall=stall_timeout),
        software=software(),
    )
    filled = destination(None, device=device, allocate=allocate)
    return await _pull_into(filled, None, found, transport, options, progress, observers)


async def _pull_into(
    filled: Destination,
    identity: ModelIdentity | None,
    found: SourceProvider,
    transport: Wanted,
    options: PullOptions,
    progress: ProgressCallback | None,
    observers: Sequence[Observer],
    relay: HoldingServer | None = None,
) -> tuple[Mapping[str, torch.Tensor], PullReport]:
    from netloader.tensors import digest_of

    transports, unavailable = _transports(filled.device, transport)
    options = replace(options, unavailable=unavailable)
    observers = (progress if isinstance(progress, Display) else PullLog(), *observers)
    progress = None if isinstance(progress, Display) else progress  # as an observer it shows waits too
    call = partial(pull_from, filled, identity, found, transports, digest_of, options, progress, relay, observers)
    return await in_own_task(partial(_prefaulted, filled, call, kept=relay is not None), "netloader.pull")


async def _prefaulted(
    filled: Destination, call: Callable[[], Awaitable[PullReport]], *, kept: bool
) -> tuple[Mapping[str, torch.Tensor], PullReport]:
    from netloader.tensors import LEAST_BYTES, Prefaulter

    prefaulter = Prefaulter(filled.larger(LEAST_BYTES))
    needed = False
    try:
        prefaulter.start()
        report = await call()
        needed = kept  # a relay serves the tensors until they are retracted there
        return filled.tensors, report
    except MemoryStillInUse:
        needed = True
        raise
    finally:
        if not needed:
            await weaken(filled.weaken, filled.manifest)
        if prefaulter.running:
            await shielded(prefaulter.stop)
        prefaulter.stop()


async def probe(
    source: str | Address,
    identity: ModelIdentity | None = None,
    *,
    role: Role = "target",
    layouts: Sequence[Layout] = ("raw", "processed", "checkpoint"),
    timeout: float = 30.0,
    token: bytes | None = None,
) -> Probe:
    """Ask a source what it holds, without pulling anything.

    Args:
        source: Its address.
        identity: Names the role and layout. Compare it with the answer by :func:`netloader.differences`.
        role: Role to ask for without an identity.
        layouts: Layouts to ask for without an identity.
        timeout: Seconds that the probe may take.
        token: Shared secret.

    Returns:
        The answer of the source.

    Raises:
        NetloaderError: The source cannot be reached, holds nothing of this role and layout, or violated the protocol.
        ConfigError: Arguments are not valid; the message names all of them.
    """
    check = Arguments()
    with check.reading():
        source = parse_address(source, field="source")
    check_identity(check, identity)
    check_asked(check, role, layouts)
    check.seconds("timeout", timeout, positive=True)
    check.token("token", token)
    check.raise_all()
    options = PullOptions(
        timeout=timeout,
        role=role,
        layouts=tuple(layouts),
        token=token,
        timings=Timings(stall=timeout),
        software=software(),
    )
    return await in_own_task(partial(probe_source, parse_address(source), identity, (), options), "netloader.probe")
