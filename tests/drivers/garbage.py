"""Invalid traffic: random and mutated frames, silent connections, resets. Plain blocking sockets."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from netloader.codecs.frames import encode_frame
from netloader.core import messages as m
from netloader.core.identity import ModelIdentity

NONCE = bytes(m.NONCE_BYTES)
_TIMEOUT = 30.0
_WORKERS = 4

HELLO = encode_frame(m.Hello(protocol=1, nonce=NONCE, abilities=(m.Ability("gloo"),), software="garbage"))
IDENTIFY = encode_frame(m.Identify(identity=ModelIdentity(model="kit")))
LOOK = encode_frame(m.Identify(layouts=("raw",), probe=True))
BASES = (
    HELLO,
    IDENTIFY,
    LOOK,
    encode_frame(m.Agree(plan="0" * 64, transport="gloo")),
    encode_frame(m.Want(ranges=((0, 3), (5, 9)))),
    encode_frame(m.Verdict(outcome="complete", blocks=3, nbytes=5000)),
    encode_frame(m.Signal(data=bytes(100))),
    encode_frame(m.Goodbye(reason="done")),
)


@dataclass(frozen=True)
class Amount:
    """How much of each kind is sent in one round."""

    frames: int = 10_000
    silent: int = 200
    resets: int = 200


def frame(rng: random.Random) -> bytes:
    """A random frame or a mutated valid one; some follow a valid Hello."""
    kind = rng.randrange(6)
    body = rng.randbytes(rng.randrange(0, 200))
    if kind == 0:
        return body
    if kind == 1:
        return struct.pack(">I", len(body)) + body
    base = bytearray(rng.choice(BASES))
    if kind == 2:
        base[0:4] = struct.pack(">I", rng.choice((0, 1, 2**18, 2**18 + 1, 2**31, 2**32 - 1)))
    elif kind == 3:
        del base[rng.randrange(len(base)) :]
    else:
        for _ in range(rng.randrange(1, 4)):
            base[rng.randrange(4, len(base))] = rng.randrange(256)
    beginning = rng.choice((b"", b"", HELLO, HELLO + IDENTIFY, HELLO + LOOK))
    return beginning + bytes(base)


def talk(port: int, data: bytes) -> None:
    """Send `data` and listen until the server closes."""
    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), _TIMEOUT) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass


def reset(port: int, data: bytes) -> None:
    """Send `data` and reset the connection."""
    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port), _TIMEOUT) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(data)


def silent(port: int, amount: int) -> list[socket.socket]:
    """Connections that send nothing; the caller closes them."""
    return [socket.create_connection(("127.0.0.1", port), _TIMEOUT) for _ in range(amount)]


def round_of(port: int, amount: Amount, seed: int, stop: Callable[[], bool] = lambda: False) -> int:
    """One round of all kinds of traffic.

    Args:
    Port of the server on the loopback address.
    How much of each kind is sent.
    Seed of the random generator.
    Called from time to time; True ends the round.

    Returns:
        Connections made for the frames.
    """
    rng = random.Random(seed)
    quiet = silent(port, amount.silent)
    calls: list[bytes] = []  # one frame to a connection, or a few: what comes after a bad one has to be got rid of
    left = amount.frames
    while left:
        count = min(left, rng.randrange(1, 5))
        calls.append(b"".join(frame(rng) for _ in range(count)))
        left -= count
    pieces = [rng.choice((b"", HELLO, HELLO + IDENTIFY, frame(rng))) for _ in range(amount.resets)]
    made = 0
    try:
        with ThreadPoolExecutor(_WORKERS) as pool:
            every = max(1, len(calls) // max(1, len(pieces)))
            for start in range(0, len(calls), every):
                if stop():
                    break
                batch = calls[start : start + every]
                list(pool.map(lambda data: talk(port, data), batch))
                made += len(batch)
                if pieces:
                    reset(port, pieces.pop())
            for piece in pieces:
                reset(port, piece)
    finally:
        for connection in quiet:
            connection.close()
    return made
