"""The server's end of a gloo channel in a separate process: `python -m tests.transports.peer PORT`.

Connects to the test's control port, offers, and then sends blocks of 1 MiB filled with their number for ever.
"""

from __future__ import annotations

import sys

import anyio
import anyio.abc

from netloader.errors import PeerLost, TransportError
from netloader.transports.base import Setup
from netloader.transports.conformance import TensorBlockView
from netloader.transports.gloo import GlooTransport

MIB = 1 << 20
HOST = "127.0.0.1"


class StreamSignals:
    """Signals over a TCP connection."""

    def __init__(self, stream: anyio.abc.ByteStream) -> None:
        self._stream = stream
        self._buffer = b""

    async def post(self, data: bytes) -> None:
        try:
            await self._stream.send(len(data).to_bytes(4, "big") + data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise PeerLost("control connection lost") from error

    async def fetch(self) -> bytes:
        length = int.from_bytes(await self._exactly(4), "big")
        return await self._exactly(length)

    async def _exactly(self, nbytes: int) -> bytes:
        while len(self._buffer) < nbytes:
            try:
                self._buffer += await self._stream.receive()
            except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
                raise PeerLost("control connection lost") from error
        data, self._buffer = self._buffer[:nbytes], self._buffer[nbytes:]
        return data


def setup_over(stream: anyio.abc.ByteStream, stall: float) -> Setup:
    return Setup(
        device="cpu",
        local_host=HOST,
        peer_host=HOST,
        peer_facts={},
        signals=StreamSignals(stream),
        timeout=20.0,
        stall=stall,
    )


async def serve(port: int) -> None:
    async with await anyio.connect_tcp(HOST, port) as stream:
        setup = setup_over(stream, stall=20.0)
        transport = GlooTransport()
        pending = await transport.offer(setup)
        await setup.signals.post(pending.offer)
        channel = await pending.accept()
        try:
            for number in range(1 << 20):
                await channel.send([TensorBlockView(number, [bytes([number % 256]) * MIB])])
        except TransportError as error:
            print(type(error).__name__, flush=True)
        finally:
            await channel.aclose()


if __name__ == "__main__":
    anyio.run(serve, int(sys.argv[1]))
