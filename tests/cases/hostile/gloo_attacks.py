"""A client, and a server, that attack the other side over gloo once the channel is open."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import torch

from netloader.transports.base import BlockView, Landed, Setup
from netloader.transports.gloo import GlooTransport
from netloader.transports.gloo.group import MARK, RECEIPT, tag
from tests.transports.bare_gloo import CLIENT, SERVER, BareGloo

Attack = Callable[[BareGloo, int], Awaitable[None]]
"""Called with this end, and the bytes of the first block."""


async def receipt(gloo: BareGloo, nbytes: int) -> None:
    """A receipt of 16 bytes where one without any is expected."""
    _send_16(gloo, SERVER, tag(RECEIPT, nbytes))


async def mark(gloo: BareGloo, nbytes: int) -> None:
    """A mark of 16 bytes where one without any is expected."""
    _send_16(gloo, CLIENT, tag(MARK, nbytes))


async def zeros(gloo: BareGloo, nbytes: int) -> None:
    """Bytes that are no message of gloo's, and silence."""
    del nbytes
    assert gloo.wire is not None
    await anyio.to_thread.run_sync(gloo.wire.sendall, bytes(4096))


def _send_16(gloo: BareGloo, to: int, number: int) -> None:
    gloo.sent = gloo.group._group.send([torch.zeros(16, dtype=torch.uint8)], to, number)


class _Attacking:
    """A channel that attacks with its first call, and then waits."""

    depth = 1
    whole_blocks = True

    def __init__(self, gloo: BareGloo, attack: Attack, over: anyio.Event) -> None:
        self._gloo, self._attack, self._over = gloo, attack, over

    async def send(self, blocks: Sequence[BlockView]) -> None:
        await self._attack(self._gloo, blocks[0].nbytes)
        self._over.set()
        await anyio.sleep_forever()

    async def recv(self, blocks: Sequence[BlockView], landed: Landed | None = None) -> None:
        await self.send(blocks)

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._gloo.aclose()


class _Pending:
    def __init__(self, offer: bytes, accept: Callable[[], Awaitable[Any]], tasks: anyio.abc.TaskGroup) -> None:
        self.offer, self._accept, self._tasks = offer, accept, tasks

    async def accept(self) -> Any:
        return await self._accept()

    async def aclose(self) -> None:
        return


class AttackingGloo:
    """A transport for `tests.drivers.kit`, of the name and with the messages of gloo.

    Attributes:
        attacked: Set once the attack was made.
    """

    name = "gloo"

    def __init__(self, attack: Attack, tasks: anyio.abc.TaskGroup) -> None:
        self.attacked = anyio.Event()
        self._attack = attack
        self._tasks = tasks

    def missing(self, device: str) -> str | None:
        return None

    def facts(self, device: str) -> Mapping[str, str]:
        return GlooTransport().facts(device)

    async def offer(self, setup: Setup) -> _Pending:
        gloo = BareGloo(SERVER, setup.signals)

        async def accept() -> _Attacking:
            await gloo.accept()
            return _Attacking(gloo, self._attack, self.attacked)

        return _Pending(await gloo.offer(self._tasks), accept, self._tasks)

    async def connect(self, offer: bytes, setup: Setup) -> _Attacking:
        gloo = BareGloo(CLIENT, setup.signals)
        await gloo.connect(offer)
        return _Attacking(gloo, self._attack, self.attacked)


def processes_below(pid: int) -> list[int]:
    """All processes that a process has started, directly or not. Processes and threads may end meanwhile."""
    found: list[int] = []
    for thread in threads_of(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children = Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
            for child in map(int, children):
                found += [child, *processes_below(child)]
    return found


def threads_of(pid: int) -> list[int]:
    """The threads of a process, none where it has ended."""
    try:
        return [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def command_of(pid: int) -> bytes:
    """What a process was started as, empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
