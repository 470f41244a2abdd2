"""The public API of the library: serve a mapping of named tensors, and pull into another one.

Importing this module does not import torch; using it does.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Self

import anyio
import anyio.to_thread

from netloader.client.probe import Probe, probe_source
from netloader.client.pull import pull_from
from netloader.core.addresses import Address, is_wildcard
from netloader.core.identity import Layout, ModelIdentity, Role
from netloader.core.options import PullOptions, ServeOptions, Timings
from netloader.core.report import ProgressCallback, PullReport
from netloader.core.sources import Source
from netloader.discovery.base import SourceProvider
from netloader.discovery.fixed import FixedSources
from netloader.observe.base import Observer
from netloader.server.server import HoldingServer
from netloader.session.off_loop import FEW_SPANS
from netloader.transports import registry
from netloader.transports.base import Transport
from netloader.transports.contract_0_1 import adapted

if TYPE_CHECKING:
    import torch

    from netloader.tensors import Destination

__all__ = ["Server", "own_host", "probe", "pull", "pull_new"]

Wanted = str | Transport | Sequence[str | Transport]
"""Transports to use: ``auto``, a name or an object, or several of them, preferred first."""

Sources = Sequence[str | Address | Source] | SourceProvider
"""Sources to pull from: a list, or a provider that finds them."""

_DAY = 86_400.0


@lru_cache(maxsize=1)
def software() -> str:
    """Name and version of this software, as peers receive it."""
    return f"netloader {version('netloader')}"


def own_host(bound: str) -> str:
    """A host address at which other hosts may reach a server bound to `bound`.

    For a server bound to all addresses, it is the one from which the kernel would send to other networks. No packet is
    sent to find it.
    """
    if not is_wildcard(bound):
        return bound
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):  # never assigned (RFC 5737)
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe_socket:
                probe_socket.setblocking(False)
                probe_socket.connect((far, 9))
                return str(probe_socket.getsockname()[0])
        except OSError:
            continue
    return "127.0.0.1"


class Server(HoldingServer):
    """Serves named tensors to clients, as an asynchronous context manager.

    Example: ``async with netloader.Server(model.state_dict(), ModelIdentity(model="m")) as server: ...``

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

    Raises (on entering):
        ConfigError: The address cannot be bound.
        ManifestError: Some of the tensors cannot be served; all of them are named.
        TransportUnavailable: No transport can run here.
    """

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
        options = ServeOptions(
            host=host,
            port=port,
            max_clients=max_clients,
            fan_out=fan_out,
            token=token,
            timings=Timings(stall=stall_timeout),
            software=software(),
        )
        carriers = _transports(_device_of(tensors, device), transport)[0]
        super().__init__(carriers, options, observers=observers)
        self._first = None if tensors is None else (tensors, identity)

    async def __aenter__(self) -> Self:
        first, self._first = self._first, None
        await super().__aenter__()
        if first is not None:
            try:
                await self.hold(*first)
            except BaseException as error:
                await self.__aexit__(type(error), error, error.__traceback__)
                raise
        return self

    @property
    def address(self) -> Address:
        """An address at which other hosts may reach this server."""
        return Address(own_host(self.host), self.port)

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
            LocalProtocolError: Other tensors are served under that role and layout.
        """
        from netloader.tensors import hold

        make = partial(hold, tensors, identity or ModelIdentity(), weak=weak)
        holding = await anyio.to_thread.run_sync(make)
        self.add(holding)
        return holding.announcement.root


def _device_of(tensors: Mapping[str, torch.Tensor] | None, default: str) -> str:
    return default if not tensors else str(next(iter(tensors.values())).device)


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
        ConfigError: An address is not valid.
    """
    from netloader.tensors import destination

    options = PullOptions(
        timeout=_DAY if timeout is None else timeout,
        wait=wait,
        stripe=stripe,
        follow=follow,
        layouts=("raw", "processed", "checkpoint") if identity is None else (identity.layout,),
        token=token,
        expect_root=expect_root or "",
        timings=Timings(stall=stall_timeout),
        software=software(),
    )
    few = len(tensors) <= FEW_SPANS  # looked at faster than a thread is started
    filled = destination(tensors) if few else await anyio.to_thread.run_sync(destination, tensors)
    return await _pull_into(filled, identity, sources, transport, options, progress, observers, relay)


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
        NoSourceLeft, MemoryStillInUse: As for :func:`pull`.
    """
    from netloader.tensors import destination

    options = PullOptions(
        timeout=_DAY if timeout is None else timeout,
        wait=wait,
        role=role,
        layouts=tuple(layouts),
        token=token,
        expect_root=expect_root or "",
        max_bytes=max_bytes,
        timings=Timings(stall=stall_timeout),
        software=software(),
    )
    filled = destination(None, device=device)
    report = await _pull_into(filled, None, sources, transport, options, progress, observers)
    return filled.tensors, report


async def _pull_into(
    filled: Destination,
    identity: ModelIdentity | None,
    sources: Sources,
    transport: Wanted,
    options: PullOptions,
    progress: ProgressCallback | None,
    observers: Sequence[Observer],
    relay: HoldingServer | None = None,
) -> PullReport:
    from netloader.tensors import LEAST_BYTES, Prefaulter, digest_of

    transports, unavailable = _transports(filled.device, transport)
    options = replace(options, unavailable=unavailable)
    found = sources if isinstance(sources, SourceProvider) else FixedSources(sources)
    prefaulter = Prefaulter(filled.larger(LEAST_BYTES))
    try:
        prefaulter.start()
        return await pull_from(filled, identity, found, transports, digest_of, options, progress, relay, observers)
    finally:
        if prefaulter.running:
            with anyio.CancelScope(shield=True):  # `stop` has a deadline of its own
                await anyio.to_thread.run_sync(prefaulter.stop)
        else:
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
    """
    options = PullOptions(
        timeout=timeout,
        role=role,
        layouts=tuple(layouts),
        token=token,
        timings=Timings(stall=timeout),
        software=software(),
    )
    (asked,) = FixedSources([source]).sources
    return await probe_source(asked.address, identity, (), options)
