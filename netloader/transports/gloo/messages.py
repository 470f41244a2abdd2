"""What this process and the process of a session write to each other, over Unix sockets that keep messages apart."""

from __future__ import annotations

from typing import Literal

import msgspec

from netloader.transports.gloo.addresses import Address, Endpoint

__all__ = [
    "LONGEST",
    "Command",
    "Connected",
    "Done",
    "Failed",
    "Finish",
    "Meet",
    "Open",
    "Post",
    "Published",
    "Reply",
    "Settle",
    "decode_command",
    "decode_reply",
    "encode",
]

LONGEST = 8 << 10
"""Most bytes of a message."""


class Open(msgspec.Struct, frozen=True, tag=True):
    """Make one end of a pair, and answer with :class:`Published`.

    Attributes:
        rank: Rank of this side, 0 or 1.
        host: Numeric address to listen at, with its zone.
        peer: Numeric address from which the peer connects, as far as is known.
        connecting: Most seconds for connecting, once both addresses are known.
    """

    rank: int
    host: str
    peer: str
    connecting: float


class Published(msgspec.Struct, frozen=True, tag=True):
    """Where gloo listens.

    Attributes:
        address: The address.
        unfiltered: Why the kernel can't filter connections to its port; empty if it can.
    """

    address: Address
    unfiltered: str = ""


class Meet(msgspec.Struct, frozen=True, tag=True):
    """Connect to the peer, whose address was checked, and answer with :class:`Connected`.

    Attributes:
        address: Where the peer listens.
        zone: Number of the interface, for a link-local IPv6 address.
    """

    address: Address
    zone: int


class Connected(msgspec.Struct, frozen=True, tag=True):
    """The pair has its connection, whose descriptor comes with this message.

    Attributes:
        dialled: This side's endpoint, if it connected.
        guests: Remote endpoints of all connections that its listener accepted.
    """

    dialled: Endpoint | None
    guests: tuple[Endpoint, ...]


class Settle(msgspec.Struct, frozen=True, tag=True):
    """Both sides agreed on the connection: accept no other, let blocks through, and answer with :class:`Done`."""


class Post(msgspec.Struct, frozen=True, tag=True):
    """Start to move bytes of the shared memory, in the direction of the socket. There is no answer.

    Attributes:
        offset: First byte.
        nbytes: How many.
    """

    offset: int
    nbytes: int


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Wait for the oldest operation that was posted, and answer with :class:`Done`."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """It is done."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """It failed, in place of any other answer.

    Attributes:
        kind: ``lost``: the peer is gone. ``timeout``: a wait passed its deadline. ``error``: anything else.
        text: What was wrong.
        hint: What to do.
    """

    kind: Literal["lost", "timeout", "error"]
    text: str
    hint: str = ""


Command = Open | Meet | Settle | Post | Finish
Reply = Published | Connected | Done | Failed

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
