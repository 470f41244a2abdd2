"""The public API of the library: serve a mapping of named tensors, and pull into another one.

Importing this module does not import torch; using it does.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any

from netloader.client.arguments import check_asked, check_identity, check_pull, check_tensors, check_transport
from netloader.client.origin import Holders, turn_of, useless_after, work_of
from netloader.client.probe import Probe, probe_source, relay_at
from netloader.client.pull import pull_from
from netloader.client.registries import Search, check_named, wanted_for
from netloader.config.arguments import Arguments
from netloader.core.addresses import Address, parse_address, parse_host
from netloader.core.identity import Layout, ModelIdentity, Role
from netloader.core.options import PullOptions, ServeOptions, Timings
from netloader.core.report import ProgressCallback, PullReport
from netloader.core.sources import Source
from netloader.core.version import own_version
from netloader.discovery.argument import Discovery, check_discovery, check_zone
from netloader.discovery.base import SourceProvider
from netloader.discovery.fixed import FixedSources
from netloader.errors import MemoryStillInUse, NoSourceLeft
from netloader.observe.base import Observer
from netloader.observe.logging import PullLog
from netloader.observe.progress import Display
from netloader.server.own_address import own_host
from netloader.server.server import HoldingServer
from netloader.server.tensor_server import Published, TensorServer
from netloader.session.off_loop import FEW_SPANS, from_thread, in_thread, shielded, weaken
from netloader.session.own_task import in_own_task
from netloader.transports import registry
from netloader.transports.base import Transport

if TYPE_CHECKING:
    import torch

    from netloader.tensors import Allocate, Destination

__all__ = ["Server", "own_host", "probe", "pull", "pull_new", "pull_or_load"]

Wanted = str | Transport | Sequence[str | Transport]
"""Transports to use: ``auto``, a name or an object, or several of them, preferred first."""

Sources = Sequence[str | Address | Source] | SourceProvider
"""Sources to pull from: a list, or a provider that finds them."""

Load = Callable[[Callable[[str], None]], Awaitable[None] | None]
"""Fills tensors from storage; is given a function that tells others how far it is."""

_DAY = 86_400.0

_PUBLISHED_WITHIN = 10.0
"""Seconds in which a registry has to accept what was loaded, before the lease is given back."""

_PULL_WAIT = 5.0
"""Seconds that a pull goes on trying sources that are not ready, before it is asked anew who loads."""


def software() -> str:
    """Name and version of this software, as peers receive it."""
    return f"netloader {own_version()}"


class Server(TensorServer):
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
        max_bandwidth: Most bytes per second that they are sent together, shared equally: a number, or text such as
            ``500MB/s``, ``2GiB/s`` or ``10Gbit/s``; None for no limit.
        fan_out: Clients served directly before further ones are redirected to relays; 0 redirects no client.
        stall_timeout: Seconds that a transfer may go without progress before the client is dropped.
        device: Device of the tensors, when none are given yet.
        observers: Receive the events of the server and its sessions (:mod:`netloader.observe`).
        discovery: Where it is published while it serves: a URL, a :class:`~netloader.discovery.Backend`, or several.
            If a registry cannot be reached, the server serves all the same, and is published when that is possible.
        zone: Published with it, so that clients can prefer a near server; None for that of ``NETLOADER_ZONE``.

    Raises (on entering, but for arguments that are not valid):
        ConfigError: Arguments are not valid, and the message names all of them; or the address cannot be bound.
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
        max_bandwidth: float | str | None = None,
        fan_out: int = 1,
        stall_timeout: float = 30.0,
        device: str = "cpu",
        observers: Sequence[Observer] = (),
        discovery: Discovery = None,
        zone: str | None = None,
    ) -> None:
        check = Arguments()
        check_tensors(check, tensors, identity, none=True)
        check.host("host", host)
        check.port("port", port)
        check_transport(check, transport)
        check.token("token", token)
        check.integer("max_clients", max_clients, least=1)
        rate = check.rate("max_bandwidth", max_bandwidth)
        check.integer("fan_out", fan_out, least=0)
        check.seconds("stall_timeout", stall_timeout, positive=True)
        check.kind("device", device, str, "the name of a device, like cpu or cuda:0")
        check.functions("observers", observers)
        backend = check_discovery(check, discovery)
        place = check_zone(check, zone)
        check.raise_all()
        options = ServeOptions(
            host=None if host is None else parse_host(host),
            port=port,
            max_clients=max_clients,
            max_bandwidth=rate,
            fan_out=fan_out,
            token=token,
            timings=Timings(stall=stall_timeout),
            software=software(),
        )
        asked = PullOptions(token=token, software=options.software)
        super().__init__(
            registry.wanted(_device_of(tensors, device), transport).transports,
            options,
            first=None if tensors is None else (tensors, identity),
            published=Published(backend, place),
            observers=observers,
            check_relay=partial(relay_at, options=asked),
        )


def _device_of(tensors: Mapping[str, torch.Tensor] | None, default: str) -> str:
    return default if not tensors else str(getattr(next(iter(tensors.values())), "device", default))


async def pull(
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
        discovery: Registries to search for servers of this model: a URL, a :class:`~netloader.discovery.Backend`, or
            several. Needs `identity` or `expect_root`. `sources` are tried first; then the nearest and least busy ones
            that are found, also those that appear during the pull.
        zone: Where this client runs: servers of this zone are preferred; None for that of ``NETLOADER_ZONE``.

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
    search = check_pull(check, sources, transport, timeout, wait, stall_timeout, token, expect_root, discovery, zone)
    check_named(check, search, identity, expect_root)
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
    return (await _pull_into(filled, identity, search, transport, options, progress, observers, relay))[1]


async def pull_or_load(
    tensors: Mapping[str, torch.Tensor],
    identity: ModelIdentity,
    load: Load,
    *,
    server: Server,
    discovery: Discovery,
    sources: Sources | None = None,
    wait: float = 600.0,
    zone: str | None = None,
    **options: Any,
) -> PullReport | None:
    """Fill `tensors` from a source; if nobody holds them, one instance of the fleet loads them, and the others wait.

    Which one that is, they agree by a lease in the registry. If it dies, the lease ends, and the next one loads. So
    storage is read once for all that are started together. After a pause longer than the lease, two may load at once,
    which costs reading and nothing else. While an instance waits, the log says for whom, and how far that one is.

    Args:
        tensors: As for :func:`pull`.
        identity: As for :func:`pull`.
        load: Fills `tensors` from storage. It is called with a function that tells those that wait how far it is, in a
            short text. A coroutine function is awaited; any other function runs in a thread.
        server: A running server, published in the same registries. It serves the tensors afterwards, and the verified
            blocks during a pull. Retract the role there before the tensors change.
        discovery: Registries, of which one gives leases.
        sources: Tried before anything else, once.
        wait: Seconds to wait for an instance that loads. After that, this one loads too, without the lease.
        zone: As for :func:`pull`.
        options: Further arguments of :func:`pull`.

    Returns:
        The report of the pull; None if the tensors were loaded from storage here.

    Raises:
        NoSourceLeft: `wait` is over, and sources that are published could not give every block.
        ConfigError: Arguments are not valid, or no registry can give a lease.
        Exception: What :func:`pull` and `load` raise otherwise.
    """
    check = Arguments()
    check_tensors(check, tensors, identity)
    check.seconds("wait", wait)
    check.function("load", load)
    backend = getattr(getattr(server, "published", None), "backend", None)
    check.kind("server", backend and server, Server, "a running netloader.Server with discovery=...")
    search = Search(FixedSources(()), check_discovery(check, discovery), check_zone(check, zone))
    check_named(check, search, identity, options.get("expect_root"))
    claims = None if search.backend is None else search.backend.claims()
    if claims is None:
        check.kind("discovery", discovery, (), "a registry that gives leases, such as redis:// or etcd://")
    check.raise_all()
    call = partial(pull, tensors, identity, discovery=discovery, zone=zone, relay=server, **options)
    until = time.monotonic() + wait
    if sources:
        with suppress(NoSourceLeft):
            return await call(sources=sources)
    wanted, name = wanted_for(identity, identity.role, ())
    provider, _ = await search.provider(wanted, name, lambda: (server.address,))
    useless: frozenset[str] = frozenset()
    while claims is not None:
        holders = Holders(provider, name, useless)
        left = max(0.0, until - time.monotonic())
        async with turn_of(holders, claims, work_of(wanted[0].key), within=left, what=name or "the model") as turn:
            if turn.loads:
                tell = _tell_nobody if turn.claim is None else turn.claim.tell
                if iscoroutinefunction(load):
                    await load(tell)
                else:
                    await in_thread(partial(load, from_thread(tell)))
                await server.hold(tensors, identity)
                await server.until_published(identity.role, within=_PUBLISHED_WITHIN)
                return None
        try:
            return await call(wait=min(left, _PULL_WAIT))
        except NoSourceLeft as error:
            if time.monotonic() >= until:
                raise
            useless |= useless_after(error)
    return None


def _tell_nobody(_progress: str) -> None:
    pass


async def pull_new(
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
    """Pull what a source holds into new tensors.

    Args:
        sources: As for :func:`pull`.
        identity: Identity that the source must match. None accepts what the source holds under `role` and `layouts`.
        role: Role to ask for without an identity.
        layouts: Layouts to accept without an identity, preferred first.
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
        discovery: As for :func:`pull`.
        zone: As for :func:`pull`.

    Returns:
        Name -> tensor, and the report of the pull.

    Raises:
        NoSourceLeft, MemoryStillInUse, ConfigError: As for :func:`pull`.
    """
    check = Arguments()
    search = check_pull(check, sources, transport, timeout, wait, stall_timeout, token, expect_root, discovery, zone)
    check_named(check, search, identity, expect_root)
    check_identity(check, identity)
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
        role=role if identity is None else identity.role,
        layouts=tuple(layouts) if identity is None else (identity.layout,),
        token=token,
        expect_root=(expect_root or "").lower(),
        max_bytes=max_bytes,
        timings=Timings(stall=stall_timeout),
        software=software(),
    )
    filled = destination(None, device=device, allocate=allocate)
    return await _pull_into(filled, identity, search, transport, options, progress, observers)


async def _pull_into(
    filled: Destination,
    identity: ModelIdentity | None,
    search: Search,
    transport: Wanted,
    options: PullOptions,
    progress: ProgressCallback | None,
    observers: Sequence[Observer],
    relay: HoldingServer | None = None,
) -> tuple[Mapping[str, torch.Tensor], PullReport]:
    from netloader.tensors import digest_of

    available = registry.wanted(filled.device, transport)
    own = (relay.address,) if isinstance(relay, TensorServer) else ()
    found, here = await search.provider(*wanted_for(identity, options.role, options.layouts), lambda: own)
    options = replace(options, unavailable=available.reasons, here=here)
    observers = (progress if isinstance(progress, Display) else PullLog(), *observers)
    progress = None if isinstance(progress, Display) else progress  # as an observer it shows waits too
    call = partial(
        pull_from, filled, identity, found, available.transports, digest_of, options, progress, relay, observers
    )
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
