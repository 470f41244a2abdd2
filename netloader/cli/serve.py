"""``netloader serve``: serves a folder of safetensors files, without an engine, until it is stopped."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from netloader import checkpoint
from netloader.api import Server
from netloader.cli.console import Exit, say, token_from
from netloader.core.identity import ModelIdentity
from netloader.core.protocol import State
from netloader.core.report import Progress
from netloader.errors import ConfigError
from netloader.observe.progress import ProgressLog
from netloader.tensors import hold
from netloader.transports import registry
from netloader.transports.base import Transport
from netloader.transports.faults import Fault, Faults, FaultyTransport

if TYPE_CHECKING:
    from netloader.tensors import TensorHolding

__all__ = ["run"]

_SHORTEST_PAUSE = 0.05
"""Least seconds between two checks of the sessions."""


class _Stopped(Exception):
    """The command was stopped while files were being hashed."""


def run(options: argparse.Namespace) -> Exit:
    """Serve until a signal comes."""
    return anyio.run(_serve, options)


async def _serve(options: argparse.Namespace) -> Exit:
    fault = None if options.fault is None else replace(Fault.parse(options.fault), times=None)
    server = _CommandServer(
        host=options.host,
        port=options.port,
        transport=_transports(options.transport, fault),
        token=token_from(options.token_file),
        max_clients=options.max_clients,
        stall_timeout=options.stall_timeout,
    )
    stop = threading.Event()
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with server, anyio.create_task_group() as tasks:
            # Only the body of this scope is cancelled. The server then sends its clients a Goodbye when it closes.
            tasks.start_soon(_stop_on_signal, signals, tasks.cancel_scope, stop)
            if options.stop_on_eof:
                tasks.start_soon(_stop_on_eof, tasks.cancel_scope, stop)
            server.expect("target", "checkpoint", reason="its files are being read and hashed")
            # The thread ends soon after `stop` is set.
            holding = await anyio.to_thread.run_sync(_read, options, stop)
            if holding is not None:
                _check(fault, holding)
                server.add(holding)
                await _serve_until_cancelled(server, holding, options)
    say("stopped")
    return Exit.OK


class _CommandServer(Server):
    _exposed_hint = "give --token-file on both sides, or a --host that only trusted hosts reach"


async def _serve_until_cancelled(server: Server, holding: TensorHolding, options: argparse.Namespace) -> None:
    announced = holding.announcement
    say(f"root {announced.root}")
    with _written(options.address_file, str(server.address)):
        say(f"serving {announced.identity.model} at {server.address}")
        await _show_sessions(server, announced.plan.nbytes, options.progress_every)


def _transports(names: Sequence[str], fault: Fault | None) -> list[str | Transport]:
    found = registry.available("cpu", names).transports
    return [transport if fault is None else FaultyTransport(transport, Faults([fault])) for transport in found]


def _read(options: argparse.Namespace, stop: threading.Event) -> TensorHolding | None:
    """Hash the files. Returns None when stopped meanwhile."""
    log = ProgressLog(say, every=options.progress_every, verb="hashed")
    began = time.monotonic()

    def hashed(nbytes: int, total: int) -> None:
        if stop.is_set():
            raise _Stopped
        log(Progress(nbytes, total, time.monotonic() - began, str(options.folder)))

    files = checkpoint.open_checkpoint(options.folder)
    model = options.model or options.folder.resolve().name
    try:
        return hold(files.tensors, ModelIdentity(model=model, layout="checkpoint"), progress=hashed)
    except _Stopped:
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


async def _show_sessions(server: Server, total: int, every: float) -> None:
    """Print the progress of each transfer whenever it advances, until cancelled."""
    pause = max(every, _SHORTEST_PAUSE)
    seen: dict[str, _Seen] = {}
    while True:
        await anyio.sleep(pause)
        now = time.monotonic()
        moving = {info.peer: info for info in server.sessions if info.state is State.TRANSFER}
        seen = {peer: seen.get(peer) or _Seen(peer, now - pause) for peer in moving}
        for peer, info in moving.items():
            seen[peer].take(info.nbytes, total, now)


class _Seen:
    """The progress of a client at the last check."""

    def __init__(self, peer: str, began: float) -> None:
        self._peer = peer
        self._began = began
        self._nbytes = 0
        self._log = ProgressLog(say, every=0, verb=f"{peer}: sent")

    def take(self, nbytes: int, total: int, now: float) -> None:
        if nbytes > self._nbytes:
            self._nbytes = nbytes
            self._log(Progress(nbytes, total, now - self._began, self._peer))


# --- the end ----------------------------------------------------------------------------------------------------------


async def _stop_on_signal(
    signals: AsyncIterator[signal.Signals], scope: anyio.CancelScope, stop: threading.Event
) -> None:
    async for number in signals:
        say(f"stopping on {number.name}")
        stop.set()
        scope.cancel()
        return


async def _stop_on_eof(scope: anyio.CancelScope, stop: threading.Event) -> None:
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


@contextmanager
def _written(path: Path | None, address: str) -> Iterator[None]:
    """Write the address to a file, atomically, and remove the file at the end."""
    if path is None:
        yield
        return
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    draft.write_text(address, encoding="ascii")
    draft.replace(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
