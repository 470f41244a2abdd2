"""Two ends of a channel, opened as a server and a client do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from netloader.errors import PeerLost
from netloader.transports.base import Channel, Setup, Signals, Transport

PATIENCE = 20.0


@dataclass
class LocalSignals:
    """One end of a control connection within the process."""

    outgoing: MemoryObjectSendStream[bytes]
    incoming: MemoryObjectReceiveStream[bytes]

    async def post(self, data: bytes) -> None:
        assert len(data) <= 64 << 10
        try:
            await self.outgoing.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise PeerLost("the control connection ended") from error

    async def fetch(self) -> bytes:
        try:
            return await self.incoming.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError) as error:
            raise PeerLost("the control connection ended") from error

    def close(self) -> None:
        self.outgoing.close()
        self.incoming.close()


def signals() -> tuple[LocalSignals, LocalSignals]:
    there, at_there = anyio.create_memory_object_stream[bytes](64)
    back, at_back = anyio.create_memory_object_stream[bytes](64)
    return LocalSignals(there, at_back), LocalSignals(back, at_there)


def setup_for(
    signals: Signals, *, host: str = "127.0.0.1", timeout: float = PATIENCE, stall: float = PATIENCE
) -> Setup:
    return Setup(
        device="cpu", local_host=host, peer_host=host, peer_facts={}, signals=signals, timeout=timeout, stall=stall
    )


@asynccontextmanager
async def opened(
    transport: Transport, client: Transport | None = None, *, host: str = "127.0.0.1", stall: float = PATIENCE
) -> AsyncIterator[tuple[Channel, Channel]]:
    """The server's channel and the client's."""
    ours, theirs = signals()
    server_setup, client_setup = setup_for(ours, host=host, stall=stall), setup_for(theirs, host=host, stall=stall)
    ends: dict[str, Channel] = {}

    pending = await transport.offer(server_setup)
    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:

            async def accept() -> None:
                ends["server"] = await pending.accept()

            tasks.start_soon(accept)
            ends["client"] = await (transport if client is None else client).connect(pending.offer, client_setup)
    try:
        yield ends["server"], ends["client"]
    finally:
        with anyio.CancelScope(shield=True), anyio.fail_after(PATIENCE):
            await ends["server"].aclose()
            await ends["client"].aclose()
            ours.close()
            theirs.close()
