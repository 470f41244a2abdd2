"""Protocol 1 written by hand, from docs/protocol.md: what a peer has to send and compute, without netloader's code.

Messages are dictionaries as they lie in a frame. Weights are two tensors of the CPU, cut into blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import anyio
import msgspec
import torch
import xxhash
from anyio.abc import SocketStream

PATIENCE = 60.0
"""Seconds after which a test that waits for something has failed."""

KEY_BYTES = 16
NONCE = bytes(range(16))

Message = dict[str, Any]


def frame(message: Message) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "big") + body


def proof(token: bytes, side: str, client_nonce: bytes, server_nonce: bytes) -> bytes:
    return hmac.digest(token, b"netloader/" + side.encode() + b"/" + client_nonce + server_nonce, "sha256")


class Wire:
    """A control connection."""

    def __init__(self, stream: SocketStream) -> None:
        self.stream = stream
        self._ahead = b""

    async def say(self, kind: str, **fields: Any) -> None:
        with contextlib.suppress(anyio.BrokenResourceError):  # the other end may have left, and is not to be told
            await self.stream.send(frame({"type": kind, **fields}))

    async def hear_frame(self) -> bytes:
        """The next frame; EndOfStream or BrokenResourceError when there will be none."""
        with anyio.fail_after(PATIENCE):
            while len(self._ahead) < 4 or len(self._ahead) < 4 + int.from_bytes(self._ahead[:4], "big"):
                self._ahead += await self.stream.receive()
        size = 4 + int.from_bytes(self._ahead[:4], "big")
        heard, self._ahead = self._ahead[:size], self._ahead[size:]
        return heard

    async def hear(self) -> Message:
        message: Message = msgspec.msgpack.decode((await self.hear_frame())[4:])
        return message


@dataclass(frozen=True)
class Weights:
    """One large tensor of `rows` KiB, and a small one.

    Args:
        seed: Of the contents.
        rows: Of the large one.
        block_bytes: Size of a block.
    """

    seed: int = 0
    rows: int = 12
    block_bytes: int = 1024

    @cached_property
    def contents(self) -> dict[str, bytes]:
        large = self.rows * 1024
        data = hashlib.shake_128(bytes([self.seed])).digest(large + 20)
        return {"a.large": data[:large], "b.small": data[large:]}

    def tensors(self) -> dict[str, torch.Tensor]:
        large, small = (torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in self.contents.values())
        return {"a.large": large.reshape(self.rows, 1024), "b.small": small.view(torch.float32)}

    def blank(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(tensor) for name, tensor in self.tensors().items()}

    @property
    def manifest(self) -> list[Any]:
        return [
            [
                ["a.large", "uint8", [self.rows, 1024], [], "nd", ""],
                ["b.small", "float32", [5], [], "nd", ""],
            ]
        ]

    @cached_property
    def manifest_digest(self) -> str:
        return hashlib.blake2b(msgspec.msgpack.encode(self.manifest), digest_size=32).hexdigest()

    @cached_property
    def spans(self) -> list[list[tuple[int, int, int]]]:
        """Of each block: tensor, offset, bytes. A tensor is cut where it is as large as a block, else packed."""
        sizes = [len(data) for data in self.contents.values()]
        if sizes[0] < self.block_bytes:
            return [[(0, 0, sizes[0]), (1, 0, sizes[1])]]
        cuts = range(0, sizes[0], self.block_bytes)
        return [[(0, at, min(self.block_bytes, sizes[0] - at))] for at in cuts] + [[(1, 0, sizes[1])]]

    @cached_property
    def blocks(self) -> list[bytes]:
        data = list(self.contents.values())
        return [b"".join(data[tensor][at : at + size] for tensor, at, size in spans) for spans in self.spans]

    @cached_property
    def plan_digest(self) -> str:
        digest = hashlib.blake2b(digest_size=32, person=b"netloader-plan")
        for spans in self.spans:
            numbers = [len(spans), spans[0][1], *(t for t, _, _ in spans), *(size for _, _, size in spans)]
            digest.update(struct.pack(f"<{len(numbers)}Q", *numbers))
        return digest.hexdigest()

    @cached_property
    def digests(self) -> bytes:
        return b"".join(xxhash.xxh3_128(block).digest() for block in self.blocks)

    @cached_property
    def root(self) -> str:
        digest = hashlib.blake2b(digest_size=32, person=b"netloader-root")
        digest.update(f"{self.manifest_digest}/{self.block_bytes}/xxh3-128/".encode() + self.digests)
        return digest.hexdigest()

    def announcement(self, *, manifest_known: bool) -> Message:
        """The fields of Announce; a manifest that the client has does not travel."""
        return {
            **({} if manifest_known else {"manifest": self.manifest}),
            "block_bytes": self.block_bytes,
            "algorithm": "xxh3-128",
            "digests": self.digests,
            "root": self.root,
            "plan": self.plan_digest,
        }


def expand(ranges: Sequence[Sequence[int]]) -> list[int]:
    return [number for first, end in ranges for number in range(first, end)]


def to_ranges(numbers: Sequence[int]) -> list[list[int]]:
    """Ranges that say `numbers` in their order."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1][1] += 1
        else:
            ranges.append([number, number + 1])
    return ranges


class DataPort:
    """The server's end of a tcp channel of one connection."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self._stream: socket.socket | None = None
        self.key, self.answer = b"k" * KEY_BYTES, b"a" * KEY_BYTES

    @property
    def offer(self) -> Mapping[str, Any]:
        port = self._listener.getsockname()[1]
        return {"port": port, "lanes": 1, "key": self.key, "answer": self.answer}

    async def let_in(self) -> None:
        """Wait for the client; it shows the key and the number of the connection, and is answered."""
        await anyio.wait_readable(self._listener)
        self._stream, _ = self._listener.accept()
        self._stream.setblocking(False)
        said = b""
        while len(said) < KEY_BYTES + 1:
            await anyio.wait_readable(self._stream)
            said += self._stream.recv(KEY_BYTES + 1 - len(said))
        assert said == self.key + b"\0"
        await self.send(self.answer)

    async def send(self, data: bytes) -> None:
        assert self._stream is not None
        left = memoryview(data)
        with contextlib.suppress(ConnectionError):  # the client may have left, which the control connection tells
            while left:
                await anyio.wait_writable(self._stream)
                left = left[self._stream.send(left) :]

    def close(self) -> None:
        for sock in (self._listener, self._stream):
            if sock is not None:
                sock.close()
