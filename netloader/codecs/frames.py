"""Control frames: 4 bytes of length (big endian), then one msgpack message.

Decoding is incremental and free of I/O. The length is checked against the cap before any of the body is kept, so a
peer can't make this side hold more than one frame of that size. With a token, each frame after the two greetings ends
with an authentication code, which counts as part of its body in the length.
"""

from __future__ import annotations

import struct
from types import UnionType
from typing import Annotated, Any, Generic, TypeVar, get_args

import msgspec

from netloader.core.keys import MAC_BYTES, FrameSeal
from netloader.core.manifest import MAX_TENSORS, TENSORS_AT_ONCE, Manifest, TensorSpec, array_header, check_sizes
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
from netloader.errors import LocalProtocolError, ManifestError, RemoteProtocolError, shown

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

SERVER_FRAME_CAP = 256 << 20
"""Most bytes in a frame from a server. It is large, because a manifest and its digests may be long."""

LARGE_FRAME = 512 << 10
"""Bytes from which on a frame is decoded outside of the event loop: decoding takes about 2 ms."""

_HEADER = struct.Struct(">I")
_ENCODER = msgspec.msgpack.Encoder()
_SMALL = Hello | Welcome | Identify | Agree | Want | Verdict
M = TypeVar("M")

_SHOWN_ERROR = 300
"""Most characters of a decoding error that are shown, because the error quotes what the peer sent."""


class _Tagged(msgspec.Struct):
    """Any message; only its name is decoded."""

    type: str


_NAME = msgspec.msgpack.Decoder(_Tagged)


class _RawManifest(msgspec.Struct, array_like=True):
    """A manifest whose tensors are not decoded yet."""

    tensors: Annotated[tuple[msgspec.Raw, ...], msgspec.Meta(max_length=MAX_TENSORS)]


_FIELDS = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_MANIFEST = msgspec.msgpack.Decoder(_RawManifest)
_TENSORS = msgspec.msgpack.Decoder(list[TensorSpec])


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
    cap = CLIENT_FRAME_CAP if isinstance(message, _SMALL) else SERVER_FRAME_CAP
    if len(body) > cap:
        hint = "shorten its texts" if cap == CLIENT_FRAME_CAP else "serve fewer tensors under one role"
        raise LocalProtocolError(f"{name} takes {len(body)} bytes, the peer accepts at most {cap}", hint=hint)
    return _HEADER.pack(len(body)) + body


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
        if self._error is not None:
            raise self._error
        self._buffer += data
        messages: list[M] = []
        start = 0
        try:
            while len(self._buffer) - start >= _HEADER.size:
                (length,) = _HEADER.unpack_from(self._buffer, start)
                self._check_length(length, CLIENT_FRAME_CAP if greeting else self._cap)
                end = start + _HEADER.size + length
                if len(self._buffer) < end:
                    break
                body = self._body(start + _HEADER.size, end)
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

    def _body(self, start: int, end: int) -> bytes | memoryview:
        """The body of the frame at this place of the buffer, which is authentic if it has to be."""
        body = bytes(memoryview(self._buffer)[start:end])
        return body if self._seal is None else self._seal.open(memoryview(body))

    def _decode(self, body: bytes | memoryview) -> M:
        try:
            return self._in_parts(body) if len(body) > LARGE_FRAME else self._decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise self._explained(body, error) from None  # its text quotes the peer

    def _in_parts(self, body: bytes | memoryview) -> M:
        """Decode a manifest in parts of some thousand tensors, so that other threads can run in between."""
        fields = _FIELDS.decode(body)
        manifest = fields.pop("manifest", None)
        name = bytes(fields.get("type", b""))[1:]
        if manifest is None or memoryview(manifest).nbytes == 1 or name != Announce.__name__.encode():
            return self._decoder.decode(body)
        tensors = _MANIFEST.decode(manifest).tensors
        parts = (tensors[at : at + TENSORS_AT_ONCE] for at in range(0, len(tensors), TENSORS_AT_ONCE))
        specs: list[TensorSpec] = []
        sizes = 0
        for part in parts:
            specs += (more := _TENSORS.decode(array_header(len(part)) + b"".join(part)))
            try:
                sizes = check_sizes(more, sizes)
            except ManifestError as error:
                raise RemoteProtocolError(error.message) from None
        message: Any = self._decoder.decode(_ENCODER.encode(fields))
        whole: M = msgspec.structs.replace(message, manifest=Manifest(tuple(specs)))
        return whole

    def _explained(self, body: bytes | memoryview, error: Exception) -> RemoteProtocolError:
        """The error for a body that is not a message, is an unknown message, or has an invalid field."""
        why = str(error)[:_SHOWN_ERROR]
        try:
            name = _NAME.decode(body).type
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
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
