"""The server of a worker process. One server serves all models that the process loads, and ends with the process.

This is the only process-wide object of the library. vLLM constructs a loader for each load, and the loaders do not know
each other. Target and draft still have to be served at one port.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any

import anyio

from netloader import api
from netloader.api import Server
from netloader.client.origin import Turn, turn_of, work_of
from netloader.config import Config, listen_port_for
from netloader.core.addresses import Address, is_wildcard
from netloader.core.identity import Layout, ModelIdentity, Role
from netloader.core.manifest import DIGEST_BYTES
from netloader.core.model_key import key_of
from netloader.core.report import PullReport
from netloader.discovery.base import Claims, SourceProvider
from netloader.discovery.configured import registries_of
from netloader.errors import ConfigError, ManifestError, NetloaderError
from netloader.session.holding import Holding
from netloader.vllm.serve.address_file import AddressFile, AddressFileError, serving_line
from netloader.vllm.serve.file_cleanup import FileCleanup
from netloader.vllm.serve.server_loop import ServerLoop, ServerLost

if TYPE_CHECKING:
    import torch

__all__ = ["ROLES", "WorkerServer", "running_server", "stop_server", "worker_server"]

log = logging.getLogger(__name__)

STOP_WITHIN = 1.8
"""Seconds that stopping may take in total. vLLM waits somewhat longer before it kills a worker."""

_LAYOUTS: tuple[Layout, ...] = ("raw", "processed")
"""The layouts that an engine may hold under one role, in the order in which clients ask for them."""

ROLES: tuple[Role, ...] = ("target", "draft")
"""The models that a worker may serve."""

_RETRACT_WITHIN = 5.0
"""Seconds that running sends may take before their sessions are ended. The engine waits for this."""


def check_unchanged(holding: Holding) -> None:
    """Check that the tensors of a holding still have the announced digests. Hashes in several threads.

    Raises:
        ManifestError: A tensor is gone, or its contents have changed.
    """
    from netloader.tensors import HASHERS, digest_plan

    announcement = holding.announcement
    plan, announced = announcement.plan, announcement.digests
    now = digest_plan(holding.memory, plan, announcement.algorithm, threads=HASHERS)
    for block in plan.blocks:
        place = slice(block.number * DIGEST_BYTES, (block.number + 1) * DIGEST_BYTES)
        if now[place] != announced[place]:
            raise ManifestError(
                f"{', '.join(plan.tensors_of(block.number)[:3])} is not what it was when it was announced",
                hint="start the engine anew to serve its weights",
            )


_LISTINGS = 30.0
"""Seconds that a registry may take to list its sources before and after the wait for a lease."""

_PUBLISHED_WITHIN = 10.0
"""Seconds in which a registry has to accept what was loaded, before the lease is given back."""

_LAST_SENDS = 1.0
"""Seconds that blocks in flight may take when a replica stops passing on what it pulled."""


class _EngineServer(Server):
    _exposed_hint = "set TOKEN_FILE on both sides, or LISTEN_HOST to an address that only trusted hosts reach"


def _engine_server(rank: int, host_name: str, **options: Any) -> Server:
    """The server of one rank, which announces `host_name` if it listens at all addresses."""
    server = _EngineServer(**options)
    server.published = replace(server.published, rank=rank, host=host_name)
    return server


class WorkerServer:
    """A server with an event loop of its own, in a daemon thread.

    Args:
        config: netloader's configuration.
        rank: The rank.
        port: The port to listen at; 0 for a free port.
        device: The device of the models, as torch names it.
        host_name: Address to announce if the server listens at all addresses; None to determine one.

    Raises:
        ConfigError: The address can't be bound.
        TransportUnavailable: No transport can run here.
    """

    def __init__(self, config: Config, rank: int, port: int, device: str, host_name: str | None = None) -> None:
        self.pid = os.getpid()
        self.settings = _settings(config)
        self._rank = rank
        self._file = None if config.output_prefix is None else AddressFile(config.output_prefix, rank)
        self._cleanup: FileCleanup | None = None
        self._stopped = False
        self._paused: dict[Role, tuple[Holding, ...]] = {}
        self._turns: dict[Role, anyio.Event] = {}  # of leases to load from storage, until they may be given back
        make = partial(
            _engine_server,
            rank,
            host_name or "",
            host=config.listen_host,
            port=port,
            transport=config.transport or "auto",
            token=None if config.token is None else config.token.reveal(),
            max_clients=config.max_clients,
            max_bandwidth=config.max_bandwidth,
            fan_out=config.fan_out,
            stall_timeout=config.stall_timeout,
            device=device,
            discovery=registries_of(config),
            zone=config.zone,
        )
        self._loop = ServerLoop(make, f"rank {rank}")
        self._server = self._loop.server
        # A worker that vLLM forked runs the finalizers of multiprocessing, but not those of atexit. The main process of
        # a program runs both.
        self._finalize = Finalize(None, self.stop, exitpriority=100)
        atexit.register(self.stop)

    @property
    def address(self) -> str:
        """The address under which clients reach the server."""
        return str(self._server.address)

    def own_addresses(self) -> tuple[Address, ...]:
        """The addresses at which this process must not pull."""
        return (self._server.address,)

    def expect(self, role: Role, reason: str) -> None:
        """Answer clients that no layout of the model is ready yet."""
        self._call(self._expect, role, reason)

    def _expect(self, role: Role, reason: str) -> None:
        for layout in _LAYOUTS:
            self._server.expect(role, layout, reason=reason)

    def _call(self, function: Callable[..., Any], *arguments: Any, within: float = 0.0) -> Any:
        """Call a function in the server's loop.

        Raises:
            ServerLost: The loop does not answer. The server is ended; a loop that is blocked ends when it goes on.
        """
        try:
            return self._loop.call(function, *arguments, within=within)
        except ServerLost as error:
            if not self._stopped:
                log.error("netloader: rank %d serves nobody any more: %s", self._rank, error)  # noqa: TRY400
            self.give_up()
            raise

    def offer(self, holding: Holding, detail: str) -> None:
        """Serve a loaded model. It replaces the model that was served under its role before, if any.

        Args:
            holding: The model.
            detail: Description of the holding, for the log.
        """
        role = holding.announcement.identity.role
        self._call(self._replace, holding, within=_RETRACT_WITHIN)
        log.info("%s", serving_line(self._rank, role, self.address, detail))
        self._write_address()

    def serves(self, role: Role) -> Holding | None:
        """What is served under `role` now; None when nothing is."""
        held: tuple[Holding, ...] = self._call(self._server.holdings.held)
        return next((h for h in held if h.announcement.identity.role == role), None)

    def ask_turn(
        self, provider: SourceProvider, claims: Claims, identity: ModelIdentity, *, what: str, within: float
    ) -> Turn:
        """Wait until a source is found or this engine is to load from storage; see `client/origin.py`.

        The lease is held until the model of this role is published or refused, or the server ends.

        Raises:
            ServerLost: The server does not answer, and was ended.
        """
        ask = partial(turn_of, provider, claims, work_of(key_of(identity)), within=within, what=what)
        most = within + _LISTINGS
        turn: Turn = self._call(self._ask_turn, ask, identity.role, most, within=most)
        return turn

    async def _ask_turn(self, ask: Callable[[], AbstractAsyncContextManager[Turn]], role: Role, most: float) -> Turn:
        self._release_turn(role)
        released = self._turns[role] = anyio.Event()
        decided, turns, scope = anyio.Event(), list[Turn](), anyio.CancelScope()

        async def hold() -> None:
            try:
                with scope:
                    async with ask() as turn:
                        turns.append(turn)
                        decided.set()
                        if turn.claim is not None:
                            await released.wait()
                            await self._server.until_published(role, within=_PUBLISHED_WITHIN)
            except Exception as error:
                log.exception("netloader: the lease of rank %d ended", self._rank)
                turns.append(Turn(loads=True, why=f"the lease can't be held: {error}"))
            finally:
                decided.set()

        self._server.beside(hold)
        with anyio.move_on_after(most):  # a registry may be slow, which is no reason to end the server
            await decided.wait()
        if not turns:
            scope.cancel()
            self._release_turn(role)
            return Turn(loads=True, why=f"the registry did not say within {most:g} s who loads")
        return turns[0]

    def _release_turn(self, role: Role) -> None:
        """The model is served or refused: another engine may load from storage, unless it finds this one."""
        if role in self._turns:
            self._turns.pop(role).set()

    def pull(self, tensors: Mapping[str, torch.Tensor], identity: ModelIdentity, **options: Any) -> PullReport:
        """:func:`netloader.pull`, while the server passes on the blocks that are verified already.

        The pull runs in the server's event loop, so that the pull and the sessions of its clients need no locks. If
        another model is served under the same role, that model stays, and nothing of the new one is passed on.

        Call :meth:`withdraw` before the tensors change.
        """
        held = self._call(self._server.holdings.held)
        relay = None if any(h.announcement.identity.role == identity.role for h in held) else self._server
        # The call waits until the pull has ended, because the pull may write to the tensors until then.
        return self._loop.call_to_completion(partial(api.pull, tensors, identity, relay=relay, **options))

    def withdraw(self, role: Role, reason: str, *, grace: float = 0.0, sources: Sequence[str] = ()) -> None:
        """Stop passing on what was pulled for `role`. Its memory may change when this returns.

        Clients that are not done are redirected to `sources`. If nothing is passed on, nothing happens.

        Args:
            role: The role.
            reason: Told to clients.
            grace: Seconds in which clients may finish. Blocks in flight get a bounded time in addition.
            sources: Addresses of sources that hold the same weights.
        """
        if self.running:
            within = grace + _LAST_SENDS
            self._call(self._withdraw, role, reason, grace, tuple(sources), within=within)

    async def _withdraw(self, role: Role, reason: str, grace: float, sources: tuple[str, ...]) -> None:
        holdings = self._server.holdings
        relayed = [h for h in holdings.held() if holdings.supply_of(h) is not None]
        if not any(holding.announcement.identity.role == role for holding in relayed):
            return
        if grace > 0:
            await self._server.drained(role, within=grace)
        await self._server.retract(role, reason=reason, within=_LAST_SENDS, sources=sources)

    def refuse(self, role: Role, reason: str, hint: str, layouts: tuple[Layout, ...] = _LAYOUTS) -> None:
        """Tell clients why this model can't be pulled from this server in these layouts.

        If these are all layouts, what was served under the role before is retracted first.
        """
        self._call(self._refuse, role, reason, hint, layouts, within=_RETRACT_WITHIN)
        self._write_address()

    def retract(self, roles: Sequence[Role], reason: str) -> None:
        """Stop serving these roles: clients get "gone". Afterwards the memory may change and be freed."""
        self.forget_paused(roles)
        self._retracted(roles, reason)

    def pause(self, roles: Sequence[Role], reason: str) -> tuple[Role, ...]:
        """Stop serving these roles as :meth:`retract` does, and keep their holdings for :meth:`resume`.

        Returns:
            The roles that were served.
        """
        found = self._retracted(roles, reason)
        self._paused.update(found)
        return tuple(found)

    def _retracted(self, roles: Sequence[Role], reason: str) -> dict[Role, tuple[Holding, ...]]:
        found: dict[Role, tuple[Holding, ...]]
        found = self._call(self._retract_all, tuple(roles), reason, within=len(roles) * _RETRACT_WITHIN)
        for role in found:
            log.info("netloader: rank %d serves its %s no more: %s", self._rank, role, reason)
        return found

    async def _retract_all(self, roles: Sequence[Role], reason: str) -> dict[Role, tuple[Holding, ...]]:
        return {role: held for role in roles if (held := await self._retract(role, reason))}

    @contextmanager
    def computes_nothing(self) -> Iterator[None]:
        """Meanwhile, raw weights are not computed from processed ones on the device.

        Raises:
            ManifestError: A computation that runs does not end.
        """
        from netloader.vllm.serve.raw_holding import RawHolding

        held: tuple[Holding, ...] = self._call(self._server.holdings.held)
        with ExitStack() as stack:
            for holding in held:
                if isinstance(holding, RawHolding):
                    stack.enter_context(holding.memory.scratch.paused())
            yield

    def forget_paused(self, roles: Sequence[Role]) -> None:
        """Drop the holdings that were kept for :meth:`resume`."""
        for role in roles:
            self._paused.pop(role, None)

    def resume(self, reason: str, roles: Sequence[Role] = ROLES) -> None:
        """Serve again what was paused, if its contents are unchanged.

        Args:
            reason: For the log.
            roles: The roles to resume.

        Raises:
            ManifestError: A tensor is gone or has changed. Its model is refused with that reason from now on.
        """
        paused = {role: self._paused.pop(role) for role in roles if role in self._paused}
        changed: ManifestError | None = None
        for role, holdings in paused.items():
            try:
                for holding in holdings:
                    check_unchanged(holding)
            except ManifestError as error:
                changed = error
                self.refuse(role, error.message, error.hint)
                continue
            for holding in holdings:
                self._call(self._replace, holding, within=_RETRACT_WITHIN)
            log.info("netloader: rank %d serves its %s again: %s", self._rank, role, reason)
        if changed is not None:
            raise changed

    def stop(self) -> None:
        """End the server: first the address file, then all sessions, in bounded time. A second call does nothing."""
        self._end(STOP_WITHIN)

    def give_up(self) -> None:
        """End the server without waiting: the address file at once, the sessions when the loop handles the request."""
        self._end(0.0)

    def _end(self, within: float) -> None:
        if self._stopped or os.getpid() != self.pid:
            return
        self._stopped = True
        atexit.unregister(self.stop)
        self._finalize.cancel()
        if self._file is not None:
            self._file.remove()
        if self._cleanup is not None:
            self._cleanup.release()
        self._loop.end(within)

    @property
    def running(self) -> bool:
        """Whether it serves: it was not stopped, and it was not inherited from the process that forked this one."""
        return not self._stopped and os.getpid() == self.pid and self._loop.alive

    async def _refuse(self, role: Role, reason: str, hint: str, layouts: tuple[Layout, ...]) -> None:
        if set(layouts) == set(_LAYOUTS):
            await self._retract(role, reason)
            self._release_turn(role)
        for layout in layouts:
            self._server.holdings.refuse(role, layout, reason, hint)

    async def _retract(self, role: Role, reason: str) -> tuple[Holding, ...]:
        held = tuple(h for h in self._server.holdings.held() if h.announcement.identity.role == role)
        if held:
            await self._server.retract(role, reason=reason, within=_RETRACT_WITHIN)
        return held

    async def _replace(self, holding: Holding) -> None:
        role = holding.announcement.identity.role
        if any(held.announcement.identity.role == role for held in self._server.holdings.held()):
            log.info("netloader: the %s model that was served until now is replaced by the one just loaded", role)
            await self._server.retract(role, reason="the model was loaded anew")
        self._server.add(holding)
        self._release_turn(role)

    def _write_address(self) -> None:
        if self._file is None:
            return
        try:
            self._file.write(self.address)
        except AddressFileError as error:
            log.error("netloader: rank %d: %s", self._rank, error)  # noqa: TRY400 - the message says it all
        else:
            self._cleanup = self._cleanup or FileCleanup(self._file.path, self.address)


_worker_server: WorkerServer | None = None


def running_server() -> WorkerServer | None:
    """The server of this process; None when there is none."""
    return _worker_server if _worker_server is not None and _worker_server.running else None


def worker_server(config: Config, rank: int, device: str) -> WorkerServer | None:
    """The server of this process. The first call starts it.

    If the server can't start, the reason is logged, and the load goes on without a server.

    Args:
        config: netloader's configuration.
        rank: The rank.
        device: The device of the models, as torch names it.

    Returns:
        The server, or None when this rank serves nobody.
    """
    global _worker_server  # noqa: PLW0603 - the one process-wide object, see the module's docstring
    decision = listen_port_for(config, rank)
    if decision.port is None:
        if decision.warning:
            log.warning("netloader: %s", decision.warning)
        else:
            log.info("netloader: rank %d serves nobody: %s", rank, decision.reason)
        return None
    server = running_server()
    if server is not None:
        if server.settings != _settings(config):
            log.warning(
                "netloader: this process serves at %s already; other settings for it are not used", server.address
            )
        return server
    try:
        _worker_server = WorkerServer(config, rank, decision.port, device, _host_name())
    except ConfigError as error:
        log.error("netloader: rank %d serves nobody: %s; %s", rank, error, decision.reason)  # noqa: TRY400
        return None
    except (NetloaderError, OSError, RuntimeError, TimeoutError, ExceptionGroup) as error:
        log.error("netloader: rank %d serves nobody: %s", rank, str(error) or type(error).__name__)  # noqa: TRY400
        return None
    return _worker_server


def stop_server() -> None:
    """End the server of this process, if there is one. The next load may start another."""
    server = running_server()
    if server is not None:
        server.stop()


def _settings(config: Config) -> tuple[object, ...]:
    """The settings that a second load in the same process can't change."""
    return (
        *(config.listen_port, config.listen_host, config.output_prefix),
        *(config.transport, config.max_clients, config.fan_out, config.stall_timeout, config.token_file),
        *(config.discovery, config.zone, config.max_bandwidth),
    )


def _host_name() -> str | None:
    # vLLM's own variable. Users set it on machines with several addresses, and some set it to 0.0.0.0, which is none.
    name = os.environ.get("VLLM_HOST_IP", "").strip()
    return None if not name or is_wildcard(name) else name
