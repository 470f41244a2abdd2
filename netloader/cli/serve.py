"""``netloader serve``: serves a folder of safetensors files, without an engine, until it is stopped."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from netloader import checkpoint
from netloader.api import Server
from netloader.checkpoint.cache import find_folder, model_name
from netloader.cli.console import Exit, progress_shown, say, token_from, watched
from netloader.cli.signals import Stop, Stopped, ending_signals, stop_on_signal
from netloader.core.identity import ModelIdentity, check_sendable, name_of
from netloader.core.protocol import State
from netloader.core.report import Progress
from netloader.discovery.address_file import AddressFile
from netloader.errors import ConfigError, plural
from netloader.observe.base import Observer
from netloader.observe.events import Event, PhaseEnded, ServingStarted, ServingStopped
from netloader.observe.metrics import Metrics
from netloader.observe.metrics_server import MetricsServer
from netloader.observe.progress import ProgressLog
from netloader.tensors import hold
from netloader.transports import registry
from netloader.transports.base import Transport
from netloader.transports.faults import Fault, Faults, FaultyTransport

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from netloader.tensors import TensorHolding

__all__ = ["run"]

_SHORTEST_PAUSE = 0.05
"""Least seconds between two checks of the sessions."""


def run(options: argparse.Namespace) -> Exit:
    """Serve until a signal comes."""
    address_file = _address_file(options.address_file)
    folder = find_folder(options.folder)
    identity = ModelIdentity(model=options.model or model_name(folder), layout="checkpoint")
    check_sendable(identity)
    return anyio.run(_serve, options, folder, identity, address_file)


async def _serve(
    options: argparse.Namespace, folder: Path, identity: ModelIdentity, address_file: AddressFile | None
) -> Exit:
    fault = None if options.fault is None else replace(Fault.parse(options.fault), times=None)
    transfers = _Transfers(options.progress_every)
    exposed = _Exposed(options.host or "", options.metrics_port)
    server = _CommandServer(
        host=options.host,
        port=options.port,
        transport=_transports(options.transport, fault),
        token=token_from(options.token_file),
        max_clients=options.max_clients,
        max_bandwidth=options.max_bandwidth,
        stall_timeout=options.stall_timeout,
        observers=[transfers.note, *exposed.observers],
        discovery=options.discovery,
        zone=options.zone,
    )
    stop = Stop()
    with ending_signals() as signals:
        async with exposed, server, anyio.create_task_group() as tasks:
            # Only the body of this scope is cancelled. The server then sends its clients a Goodbye when it closes.
            tasks.start_soon(stop_on_signal, signals, tasks.cancel_scope, stop, _say_signal)
            if options.stop_on_eof:
                tasks.start_soon(_stop_on_eof, tasks.cancel_scope, stop)
            server.expect("target", "checkpoint", reason="its files are being read and hashed")
            # The thread ends soon after `stop` is set.
            holding = await anyio.to_thread.run_sync(_read, folder, identity, options, stop)
            if holding is not None:
                _check(fault, holding)
                server.add(holding)
                await _serve_until_cancelled(server, holding, address_file, transfers)
    say("stopped")
    return Exit.OK


class _Exposed:
    """Metrics and probes of this process, at a port of their own; nothing without a port.

    Args:
        host: Where to listen.
        port: As the user gave it.
    """

    def __init__(self, host: str, port: int | None) -> None:
        self._host = host
        self._port = port
        self._serving = False
        self._http: MetricsServer | None = None
        self._registry: CollectorRegistry | None = None
        self.observers: list[Observer] = []
        if port is not None:
            metrics = Metrics(field="--metrics-port")
            self._registry = metrics.registry
            self.observers = [metrics, self._note]

    def _note(self, event: Event) -> None:
        if isinstance(event, ServingStarted | ServingStopped):
            self._serving = isinstance(event, ServingStarted)

    def _missing(self) -> str:
        return "" if self._serving else "the files are being read and hashed"

    async def __aenter__(self) -> None:
        if self._registry is not None and self._port is not None:
            start = partial(MetricsServer, ready=self._missing, field="--metrics-port")
            self._http = await anyio.to_thread.run_sync(start, self._host, self._port, self._registry)
            say(f"metrics at port {self._http.port}")

    async def __aexit__(self, *error: object) -> None:
        if self._http is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._http.close)


class _CommandServer(Server):
    _exposed_hint = "give --token-file on both sides, or a --host that only trusted hosts reach"


async def _serve_until_cancelled(
    server: Server, holding: TensorHolding, address_file: AddressFile | None, transfers: _Transfers
) -> None:
    announced = holding.announcement
    say(f"root {announced.root}")
    if announced.metadata:
        say(f"metadata: {plural(len(announced.metadata), 'entry', 'entries')}")
    async with _written(address_file, str(server.address)):
        say(f"serving {name_of(announced.identity)} at {server.address}")
        await transfers.show(server, announced.plan.nbytes)


def _transports(names: Sequence[str], fault: Fault | None) -> list[str | Transport]:
    found = registry.available("cpu", names).transports
    return [transport if fault is None else FaultyTransport(transport, Faults([fault])) for transport in found]


def _read(folder: Path, identity: ModelIdentity, options: argparse.Namespace, stop: Stop) -> TensorHolding | None:
    """Hash the files. Returns None when stopped meanwhile."""
    files = checkpoint.open_checkpoint(folder)
    for line in files.left_out:
        say(f"left out: {line}", to_stderr=True)
    with progress_shown(options.progress_every, "hashed") as shown:
        try:
            progress = watched(shown, str(folder), stop)
            return hold(files.tensors, identity, progress=progress, metadata=files.metadata)
        except Stopped:
            return None


def _check(fault: Fault | None, holding: TensorHolding) -> None:
    """Refuse a fault that can't occur.

    Raises:
        ConfigError: There is no such block, or no such byte in it.
    """
    if fault is None:
        return
    blocks = holding.announcement.plan.blocks
    if fault.block >= len(blocks):
        raise ConfigError(field="--fault block", value=fault.block, allowed=f"0 to {len(blocks) - 1}")
    nbytes = blocks[fault.block].nbytes
    if fault.byte >= nbytes:
        raise ConfigError(field="--fault byte", value=fault.byte, allowed=f"0 to {nbytes - 1}, in block {fault.block}")


class _Transfers:
    """Shows the progress of each transfer on standard error.

    Args:
        every: Seconds between two lines.
    """

    def __init__(self, every: float) -> None:
        self._pause = max(every, _SHORTEST_PAUSE)
        self._began: dict[str, float] = {}

    def note(self, event: Event) -> None:
        """Take an event of the server: a transfer begins when its plan is agreed."""
        if isinstance(event, PhaseEnded) and event.phase == "plan":
            self._began[event.peer] = time.monotonic()

    async def show(self, server: Server, total: int) -> None:
        """Show the progress whenever it advances, until cancelled."""
        shown: dict[str, _Transfer] = {}
        while True:
            await anyio.sleep(self._pause)
            moving = {info.peer: info for info in server.sessions if info.state is State.TRANSFER}
            self._began = {peer: began for peer, began in self._began.items() if peer in moving}
            shown = {peer: shown.get(peer) or _Transfer(peer) for peer in moving}
            for peer, info in moving.items():
                seconds = time.monotonic() - self._began.setdefault(peer, time.monotonic())
                shown[peer].take(Progress(info.nbytes, total, seconds, peer))


class _Transfer:
    """The progress of one client."""

    def __init__(self, peer: str) -> None:
        self._nbytes = 0
        self._log = ProgressLog(partial(say, to_stderr=True), every=0, verb=f"{peer}: sent")

    def take(self, at: Progress) -> None:
        if at.verified > self._nbytes:
            self._nbytes = at.verified
            self._log(at)


# --- the end ----------------------------------------------------------------------------------------------------------


def _say_signal(number: Signals) -> None:
    say(f"stopping on {number.name}")


async def _stop_on_eof(scope: anyio.CancelScope, stop: Stop) -> None:
    descriptor = sys.stdin.fileno()
    try:
        await anyio.wait_readable(descriptor)
        while os.read(descriptor, 4096):
            await anyio.wait_readable(descriptor)
    except PermissionError as error:
        raise ConfigError(
            field="--stop-on-eof", value=sys.stdin.name, allowed="a pipe, a socket or a terminal as standard input"
        ) from error
    stop.set()
    scope.cancel()


def _address_file(path: Path | None) -> AddressFile | None:
    """The file for the address.

    Raises:
        AddressFileError: It can't be written. This is found before anything is read.
    """
    if path is None:
        return None
    file = AddressFile(path, hint="--address-file must name a file in a folder that exists and can be written")
    if (problem := file.problem()) is not None:
        raise problem
    return file


@asynccontextmanager
async def _written(file: AddressFile | None, address: str) -> AsyncIterator[None]:
    """Write the address to a file, and remove the file at the end."""
    if file is None:
        yield
        return
    await anyio.to_thread.run_sync(file.write, address)
    try:
        yield
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(file.remove)
