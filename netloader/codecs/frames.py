"""Control frames: 4 bytes of length (big endian), then one msgpack message.

Decoding is incremental and free of I/O. The length is checked against the cap before any of the body is kept, so a
peer can't make this side hold more than one frame of that size. Only an announcement may be long, once in a session.
With a token, each frame after the two greetings ends with an authentication code, which counts as part of its body in
the length.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from types import UnionType
from typing import Any, Generic, TypeVar, get_args

import msgspec

from netloader.codecs.announcements import OTHER_BYTES, PREFIX_BYTES, begins_an_announcement, decode_in_parts
from netloader.core.keys import MAC_BYTES, FrameSeal
from netloader.core.manifest import MAX_MANIFEST_BYTES
from netloader.core.messages import (
    PROTOCOL,
    Agree,
    Announce,
    ClientMessage,
    Hello,
    Identify,
    ServerMessage,
    Verdict,
    Want,
    Welcome,
    wire_body,
)
from netloader.errors import LocalProtocolError, RemoteProtocolError, shown

__all__ = [
    "CLIENT_FRAME_CAP",
    "LARGE_FRAME",
    "SERVER_FRAME_CAP",
    "FrameDecoder",
    "client_messages",
    "encode_frame",
    "seal_frame",
    "server_messages",
]

CLIENT_FRAME_CAP = 256 << 10
"""Most bytes in a frame from a client. It is small, because a server reads from unauthenticated clients."""

SERVER_FRAME_CAP = MAX_MANIFEST_BYTES + OTHER_BYTES
"""Most bytes in a frame from a server: an announcement of the most tensors and blocks."""

LARGE_FRAME = 512 << 10
"""Bytes from which on a frame is decoded outside of the event loop: decoding takes about 2 ms. A longer frame has to be
an announcement."""

_HEADER = struct.Struct(">I")
_SMALL = Hello | Welcome | Identify | Agree | Want | Verdict
M = TypeVar("M")

_INVALID = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_ANNOUNCE = b"\x81\xa4type\xa8Announce"

_SHOWN_ERROR = 300
"""Most characters of a decoding error that are shown, because the error quotes what the peer sent."""


class _Tagged(msgspec.Struct):
    """Any message; only its name is decoded."""

    type: str


_NAME = msgspec.msgpack.Decoder(_Tagged)


def encode_frame(message: ClientMessage | ServerMessage) -> bytes:
    """One message as a frame.

    Raises:
        LocalProtocolError: The message is larger than a peer accepts, or can't be encoded in msgpack.
    """
    name = type(message).__name__
    try:
        body = wire_body(message)
    except (UnicodeEncodeError, OverflowError, TypeError) as error:
        raise LocalProtocolError(
            f"{name} cannot be sent: {error}", hint="use names and paths that are valid UTF-8"
        ) from error
    cap = _cap_of(message)
    if len(body) > cap:
        hint = "serve fewer tensors under one role" if cap == SERVER_FRAME_CAP else "shorten its texts"
        raise LocalProtocolError(f"{name} takes {len(body)} bytes, the peer accepts at most {cap}", hint=hint)
    return _HEADER.pack(len(body)) + body


def _cap_of(message: ClientMessage | ServerMessage) -> int:
    if isinstance(message, Announce):
        return SERVER_FRAME_CAP
    return CLIENT_FRAME_CAP if isinstance(message, _SMALL) else LARGE_FRAME


def seal_frame(frame: bytes, seal: FrameSeal) -> bytes:
    """A frame with its authentication code. `seal` counts it: frames have to be sent in the order of these calls."""
    body = memoryview(frame)[_HEADER.size :]
    return b"".join((_HEADER.pack(len(body) + MAC_BYTES), body, seal.close(body)))


class FrameDecoder(Generic[M]):
    """Decodes a byte stream into messages.

    Args:
        decoder: Typed decoder for the messages that this side may receive.
        names: Names of those messages.
        cap: Largest body accepted, in bytes.

    Attributes:
        first_body: Body of the message that was returned as the greeting, as it came; empty before.
    """

    def __init__(self, decoder: msgspec.msgpack.Decoder[M], names: frozenset[str], cap: int) -> None:
        self._decoder = decoder
        self._names = names
        self._cap = cap
        self.first_body = b""
        self._seal: FrameSeal | None = None
        self._buffer = bytearray()
        self._error: RemoteProtocolError | None = None

    @property
    def pending(self) -> int:
        """Bytes of an unfinished frame; 0 between frames."""
        return len(self._buffer)

    def authenticate(self, seal: FrameSeal) -> None:
        """Accept only authentic frames from here on, also of those that came already and were not returned."""
        self._seal = seal

    def feed(self, data: bytes, *, greeting: bool = False) -> list[M]:
        """Take bytes as they came from the peer.

        Args:
            data: Any number of bytes, split anywhere.
            greeting: Return the first message only, and accept only a small one. What follows it stays here, because
                it can't be decoded before it is known whether it has to be authentic.

        Returns:
            Every message that is complete now, in order. Messages before an invalid frame are returned first, and the
            next call raises, even without data. So the result does not depend on how the stream was split.

        Raises:
            RemoteProtocolError: A frame is larger than the cap, or its body is not a message. Every later call raises
                it again.
        """
        steps = self.feed_in_steps(data, greeting=greeting)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                messages: list[M] = end.value
                return messages

    def feed_in_steps(self, data: bytes, *, greeting: bool = False) -> Generator[None, None, list[M]]:
        """As :meth:`feed`, in steps of some milliseconds.

        It may be left after any step. Nothing more can be fed then.
        """
        if self._error is not None:
            raise self._error
        self._buffer += data
        messages: list[M] = []
        start = 0
        try:
            while len(self._buffer) - start >= _HEADER.size:
                (length,) = _HEADER.unpack_from(self._buffer, start)
                self._check_length(length, CLIENT_FRAME_CAP if greeting else self._cap)
                begin, end = start + _HEADER.size, start + _HEADER.size + length
                large = length > LARGE_FRAME + (0 if self._seal is None else MAC_BYTES)
                if large and len(self._buffer) >= begin + PREFIX_BYTES:
                    self._check_large(begin)
                if len(self._buffer) < end:
                    break
                if large:
                    whole, self._buffer, start = self._buffer, self._buffer[end:], 0
                    messages.append((yield from self._large(memoryview(whole)[begin:end])))
                    continue
                body = self._opened(bytes(memoryview(self._buffer)[begin:end]))
                messages.append(self._decode(body))
                start = end
                if greeting:
                    self.first_body = bytes(body)
                    break
        except RemoteProtocolError as error:
            self._error = error
            self._buffer.clear()
            if messages:
                return messages
            raise
        del self._buffer[:start]
        return messages

    def _check_length(self, length: int, cap: int) -> None:
        if length > cap + (0 if self._seal is None else MAC_BYTES):
            raise RemoteProtocolError(
                f"the peer sent a frame of {length} bytes, at most {cap} are accepted",
                hint="is this a netloader address?",
            )

    def _check_large(self, begin: int) -> None:
        """Check that the long body that begins there is the one announcement of the session."""
        if not begins_an_announcement(memoryview(self._buffer[begin : begin + PREFIX_BYTES])):
            raise RemoteProtocolError(
                f"the peer sent a frame of more than {LARGE_FRAME} bytes that is no announcement",
                hint="is this a netloader address?",
            )

    def _opened(self, body: bytes | memoryview) -> bytes | memoryview:
        """The body of a frame, which is authentic if it has to be."""
        return body if self._seal is None else self._seal.open(memoryview(body))

    def _decode(self, body: bytes | memoryview) -> M:
        try:
            return self._decoder.decode(body)
        except _INVALID as error:
            raise self._explained(body, error) from None  # its text quotes the peer

    def _large(self, body: memoryview) -> Generator[None, None, M]:
        """Decode the body of a long announcement, which is the last long frame that is accepted."""
        self._cap = LARGE_FRAME
        opened = self._opened(body)
        yield
        decode: Any = self._decoder.decode
        try:
            message: Any = yield from decode_in_parts(opened, decode)
        except _INVALID as error:
            raise self._explained(_ANNOUNCE, error) from None
        whole: M = message
        return whole

    def _explained(self, body: bytes | memoryview, error: Exception) -> RemoteProtocolError:
        """The error for a body that is not a message, is an unknown message, or has an invalid field."""
        why = str(error)[:_SHOWN_ERROR]
        try:
            name = _NAME.decode(body).type
        except _INVALID:
            return RemoteProtocolError(f"the peer sent no valid message: {why}", hint="is this a netloader address?")
        hint = f"this side speaks protocol {PROTOCOL}: run the same netloader release on both sides"
        if name in self._names:
            return RemoteProtocolError(f"the peer sent a {name} that is not valid: {why}", hint=hint)
        known = ", ".join(sorted(self._names))
        return RemoteProtocolError(f"the peer sent {shown(name, 80)}, which is none of {known}", hint=hint)


def _names(union: UnionType) -> frozenset[str]:
    return frozenset(kind.__name__ for kind in get_args(union))


def client_messages() -> FrameDecoder[ClientMessage]:
    """A decoder for the messages of clients, for use by a server."""
    return FrameDecoder(msgspec.msgpack.Decoder(ClientMessage), _names(ClientMessage), CLIENT_FRAME_CAP)


def server_messages(cap: int = SERVER_FRAME_CAP) -> FrameDecoder[ServerMessage]:
    """A decoder for the messages of servers, for use by a client that accepts frames of at most `cap` bytes."""
    return FrameDecoder(msgspec.msgpack.Decoder(ServerMessage), _names(ServerMessage), cap)
