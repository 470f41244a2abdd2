"""The protocol written by hand, from docs/protocol.md: what a peer has to send and compute, without netloader's code.

Without a token it speaks version 1, with a token version 2.

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


NO_PROOF = bytes(32)
LEAST_PADDING = 128
CODE_BYTES = 16


def keys(token: bytes, hello: bytes, welcome: bytes) -> dict[str, bytes]:
    """The keys of a session, from the bodies of Hello and of Welcome, where zeros stand in place of the proof."""
    transcript = b"".join(struct.pack(">I", len(body)) + body for body in (hello, welcome))
    secret = hmac.digest(token, b"netloader/2/session\0" + transcript, "sha256")
    labels = ("server proof", "client", "server", "data")
    return {label: hmac.digest(secret, b"netloader/2/" + label.encode() + b"\0\x01", "sha256") for label in labels}


def data_key(key: bytes, side: str, offered: bytes) -> bytes:
    """What `side` sends on a data connection; `offered` came in the offer, `key` is that of the session's data."""
    label = f"netloader/2/data {side}".encode()
    return hmac.digest(key, label + b"\0" + offered + b"\x01", "sha256")[: len(offered)]


def code(key: bytes, number: int, body: bytes) -> bytes:
    """The authentication code of a frame."""
    return hmac.digest(key, struct.pack(">Q", number) + body, "sha256")[:CODE_BYTES]


class Wire:
    """A control connection.

    Attributes:
        said, heard: Body of the first frame in each direction.
        keys: Those of the session, once there are some.
    """

    def __init__(self, stream: SocketStream) -> None:
        self.stream = stream
        self._ahead = b""
        self.said = self.heard = b""
        self.keys: dict[str, bytes] = {}
        self._numbers = {"client": 0, "server": 0}

    async def say(self, kind: str, **fields: Any) -> None:
        raw = frame({"type": kind, **fields})
        self.said = self.said or raw[4:]
        if self.keys:
            body = raw[4:] + self._code(self._side, raw[4:])
            raw = len(body).to_bytes(4, "big") + body
        with contextlib.suppress(anyio.BrokenResourceError):  # the other end may have left, and is not to be told
            await self.stream.send(raw)

    async def welcome(self, token: bytes, **fields: Any) -> None:
        """A server's Welcome with its proof; from here on frames are authenticated."""
        body = frame({"type": "Welcome", **fields, "proof": NO_PROOF})[4:]
        found = keys(token, self.heard, body)
        await self.say("Welcome", **fields, proof=found["server proof"])
        self.keys, self._side = found, "server"

    def welcomed(self, token: bytes) -> None:
        """A client heard Welcome: check its proof; from here on frames are authenticated."""
        proof = msgspec.msgpack.decode(self.heard)["proof"]
        self.keys, self._side = keys(token, self.said, self.heard.replace(proof, NO_PROOF)), "client"
        assert proof == self.keys["server proof"]

    def _code(self, side: str, body: bytes) -> bytes:
        number, self._numbers[side] = self._numbers[side], self._numbers[side] + 1
        return code(self.keys[side], number, body)

    async def hear_frame(self) -> bytes:
        """The next frame, without its authentication code, which is checked.

        EndOfStream or BrokenResourceError when there will be none.
        """
        with anyio.fail_after(PATIENCE):
            while len(self._ahead) < 4 or len(self._ahead) < 4 + int.from_bytes(self._ahead[:4], "big"):
                self._ahead += await self.stream.receive()
        size = 4 + int.from_bytes(self._ahead[:4], "big")
        heard, self._ahead = self._ahead[:size], self._ahead[size:]
        self.heard = self.heard or heard[4:]
        if not self.keys:
            return heard
        body, found = heard[4:-CODE_BYTES], heard[-CODE_BYTES:]
        first = not any(self._numbers.values())
        expected = self._code("client" if self._side == "server" else "server", body)
        if first and found != expected:  # a client that did not accept the proof says goodbye without a code
            self.keys = {}
            return heard
        assert found == expected
        return len(body).to_bytes(4, "big") + body

    async def hear(self) -> Message:
        return fields_of((await self.hear_frame())[4:])


def fields_of(body: bytes) -> Message:
    """The fields of a message, without the texts in front of a client's first one."""
    found: Message = msgspec.msgpack.decode(body)
    return {name: value for name, value in found.items() if len(name) < LEAST_PADDING}


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
    """The server's end of a tcp channel of one connection.

    Args:
        secret: The session's key for data, with a token.
    """

    def __init__(self, secret: bytes = b"") -> None:
        self._secret = secret
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
        key, answer = self.key, self.answer
        if self._secret:
            key, answer = data_key(self._secret, "client", key), data_key(self._secret, "server", answer)
        assert said == key + b"\0"
        await self.send(answer)

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
