"""A server of named tensors, which it describes, hashes, and publishes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self

import anyio
import anyio.to_thread

from netloader.core.addresses import Address, is_loopback, is_wildcard
from netloader.core.identity import ModelIdentity, Role
from netloader.core.options import ServeOptions
from netloader.discovery.base import Backend
from netloader.discovery.place import this_place
from netloader.errors import LocalProtocolError
from netloader.observe.base import Observer
from netloader.observe.events import Event
from netloader.server.own_address import own_host
from netloader.server.own_loop import serving_at
from netloader.server.publishing import Publishing
from netloader.server.relay_check import CheckRelay
from netloader.server.server import HoldingServer
from netloader.session.holding import Holding
from netloader.session.off_loop import in_thread, weaken
from netloader.session.own_task import OwnTask
from netloader.session.relay_progress import Supply
from netloader.transports.base import Transport

if TYPE_CHECKING:
    import torch

    from netloader.tensors import TensorHolding

__all__ = ["Published", "TensorServer"]

_log = logging.getLogger("netloader")


@dataclass(frozen=True, slots=True)
class Published:
    """How a server is published.

    Attributes:
        backend: The registries; None to publish nothing.
        zone: The zone in which it runs; empty for none.
        rank: The rank that it serves, as its engine numbers it; None without an engine.
        host: Host of the published address if the server listens at all addresses; empty to determine one.
    """

    backend: Backend | None = None
    zone: str = ""
    rank: int | None = None
    host: str = ""


class TensorServer(HoldingServer):
    """Serves named tensors to clients, as an asynchronous context manager.

    It may be entered in one task and left in another one of the same event loop.

    Args:
        transports: Transports it may use, preferred first.
        options: Limits, deadlines and the token.
        first: Tensors to serve from the beginning, and their identity.
        published: Where it is published.
        observers: Receive the events of the server and its sessions.
        check_relay: Asks a client that says that it relays for its name as a relay.

    Attributes:
        published: Where and how it is published. It may be replaced before the server is entered.
    """

    _exposed_hint: ClassVar[str] = "pass token=..., or a host=... that only trusted hosts reach"  # in its users' words

    def __init__(
        self,
        transports: Sequence[Transport],
        options: ServeOptions,
        *,
        first: tuple[Mapping[str, torch.Tensor], ModelIdentity | None] | None = None,
        published: Published | None = None,
        observers: Sequence[Observer] = (),
        check_relay: CheckRelay | None = None,
    ) -> None:
        self._publishing: Publishing | None = None
        super().__init__(transports, options, observers=[*observers, self._note], check_relay=check_relay)
        self._first = first
        self._warn_if_exposed = options.token is None
        self._held: list[TensorHolding] = []
        self.published = published or Published()
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
            found = await anyio.to_thread.run_sync(own_host, self.host, self._options.host)
            self._own_host = (self.published.host if is_wildcard(self.host) else "") or found
            await self._publish()
            await self._hold_first()
            with serving_at(self.port, self.host, found, self._own_host):
                yield
        finally:
            try:
                if self._publishing is not None:
                    self._publishing.stop()  # clients that look for a server now find others
                await super().__aexit__(None, None, None)
            finally:
                for holding in self._held:
                    await weaken(holding.memory.weaken, holding.announcement.manifest)

    async def _publish(self) -> None:
        """Start to publish what is served, if there is a registry that servers can publish in."""
        backend = self.published.backend
        publisher = None if backend is None else backend.publisher()
        if publisher is not None:
            self._publishing = Publishing(
                publisher,
                self.holdings,
                await anyio.to_thread.run_sync(this_place, self.published.zone),
                rank=self.published.rank,
                address=lambda: self.address,
                traffic=self.traffic,
            )
            self.beside(self._publishing.run)

    def _note(self, event: Event) -> None:
        if self._publishing is not None:
            self._publishing.note(event)

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

    async def until_published(self, role: Role = "target", *, within: float) -> bool:
        """Wait until what is served under `role` is published, or an attempt has failed, for `within` seconds at most.

        Returns:
            False if neither is so: it is not served, there is no registry, or the registry does not answer in time.
        """
        holding = next((one for one in self.holdings.held() if one.announcement.identity.role == role), None)
        if self._publishing is None or holding is None:
            return False
        with anyio.move_on_after(within) as waited:
            await self._publishing.published(holding)
        return not waited.cancelled_caught

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
