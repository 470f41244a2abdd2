"""Two ends of an HCCL channel in one process, each on its own simulated device."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import anyio

from netloader.transports.base import BlockView, Channel, Landed, Setup, Signals
from netloader.transports.conformance import TensorBlockView, local_signals
from netloader.transports.hccl import HcclTransport

PATIENCE = 30.0
CLIENT, SERVER = "npu:0", "npu:1"


def setup_for(signals: Signals, device: str, *, timeout: float = PATIENCE, stall: float = PATIENCE) -> Setup:
    transport = HcclTransport()
    return Setup(
        device=device,
        local_host="127.0.0.1",
        peer_host="127.0.0.1",
        peer_facts=transport.facts(device),
        signals=signals,
        timeout=timeout,
        stall=stall,
    )


class Placed:
    """A channel that copies the blocks of a check to its device before it transfers them."""

    depth = 1
    whole_blocks = True

    def __init__(self, channel: Channel, device: str) -> None:
        self.channel = channel
        self._device = device

    def _here(self, blocks: Sequence[BlockView]) -> Sequence[BlockView]:
        for block in blocks:
            assert isinstance(block, TensorBlockView)
            block._spans = [span.to(self._device) for span in block._spans]
            block._device = self._device
        return blocks

    async def send(self, blocks: Sequence[BlockView]) -> None:
        await self.channel.send(self._here(blocks))

    async def recv(self, blocks: Sequence[BlockView], landed: Landed | None = None) -> None:
        await self.channel.recv(self._here(blocks), landed)

    async def aclose(self) -> None:
        await self.channel.aclose()


@asynccontextmanager
async def pair(
    *,
    stall: float = PATIENCE,
    timeout: float = PATIENCE,
    client: str = CLIENT,
    server: str = SERVER,
    heard: Callable[[Signals], Signals] = lambda signals: signals,
) -> AsyncIterator[tuple[Channel, Channel]]:
    """The server's end and the client's end, whose control connection is wrapped by `heard`."""
    ours, theirs = local_signals()
    listening = heard(theirs)
    transport = HcclTransport()
    opened: list[Channel] = []
    try:
        pending = await transport.offer(setup_for(ours, server, stall=stall, timeout=timeout))
        async with anyio.create_task_group() as tasks:

            async def connect() -> None:
                opened.append(
                    await transport.connect(pending.offer, setup_for(listening, client, stall=stall, timeout=timeout))
                )

            tasks.start_soon(connect)
            accepted = await pending.accept()
        yield Placed(accepted, server), Placed(opened[0], client)
    finally:
        with anyio.CancelScope(shield=True):
            for channel in (*opened, *([accepted] if opened else [])):
                with anyio.fail_after(PATIENCE):
                    await channel.aclose()
        ours.close()
        theirs.close()
