"""The keys of a session that is authenticated by a token, and the authentication code of its frames. Pure.

Both sides derive the keys from the token and the exact bytes of the two greetings (Hello and Welcome). So a changed
greeting gives other keys, and nothing depends on an address or a port, which forwarders change.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field

from netloader.errors import RemoteProtocolError

__all__ = [
    "MAC_BYTES",
    "NO_PROOF",
    "PROOF_BYTES",
    "FrameSeal",
    "NotAuthentic",
    "SessionKeys",
    "derive",
    "session_keys",
    "without_proof",
]

PROOF_BYTES = 32
NO_PROOF = bytes(PROOF_BYTES)
"""What stands in Welcome in place of the proof while the keys are derived."""

MAC_BYTES = 16
"""Bytes of the authentication code at the end of a frame."""

_LABEL = b"netloader/2/"
_LENGTH_BYTES = 4
_COUNTER_BYTES = 8


class NotAuthentic(RemoteProtocolError):
    """A frame does not have the authentication code that the peer would have given it."""


@dataclass(frozen=True, slots=True)
class SessionKeys:
    """The keys of one session.

    Attributes:
        proof: What the server sends in Welcome to prove that it knows the token; used for nothing else.
        client: Authenticates the frames of the client.
        server: Authenticates the frames of the server.
        data: From it transports derive what authenticates their data connections.
    """

    proof: bytes = field(repr=False)
    client: bytes = field(repr=False)
    server: bytes = field(repr=False)
    data: bytes = field(repr=False)


def derive(key: bytes, label: str, context: bytes = b"", nbytes: int = 32) -> bytes:
    """A key for one purpose, by HKDF-Expand (RFC 5869) with SHA-256.

    Args:
        key: A key that is not used directly.
        label: The purpose.
        context: What else the derived key is bound to.
        nbytes: Its length, at most 8160.
    """
    info, block, derived = _LABEL + label.encode() + b"\0" + context, b"", b""
    for number in range(1, -(-nbytes // hashlib.sha256().digest_size) + 1):
        block = hmac.digest(key, block + info + bytes([number]), "sha256")
        derived += block
    return derived[:nbytes]


def session_keys(token: bytes, hello: bytes, welcome: bytes) -> SessionKeys:
    """Derive the keys of a session.

    Args:
        token: The shared secret.
        hello: Body of the client's Hello, as it was sent.
        welcome: Body of the server's Welcome, as it was sent, with :data:`NO_PROOF` in place of the proof.
    """
    transcript = b"".join(len(body).to_bytes(_LENGTH_BYTES, "big") + body for body in (hello, welcome))
    secret = hmac.digest(token, _LABEL + b"session\0" + transcript, "sha256")
    return SessionKeys(*(derive(secret, label) for label in ("server proof", "client", "server", "data")))


def without_proof(welcome: bytes, proof: bytes) -> bytes | None:
    """The body of a Welcome with :data:`NO_PROOF` in place of `proof`; None when `proof` can't be one.

    The proof has to be in it exactly once, so that each body belongs to one transcript.
    """
    if len(proof) != PROOF_BYTES or welcome.count(proof) != 1:
        return None
    return welcome.replace(proof, NO_PROOF)


class FrameSeal:
    """Authenticates the frames of one direction, in order.

    The code of a frame is computed over its number, counted from 0, and its body. So a frame that is changed, repeated,
    left out or moved has a wrong code, and so have all frames after it.

    Args:
        key: The key of this direction.
    """

    def __init__(self, key: bytes) -> None:
        self._base = hmac.new(key, digestmod=hashlib.sha256)
        self._count = 0

    def close(self, body: bytes | memoryview) -> bytes:
        """The code of the next frame to send. Releases the GIL for a large `body`."""
        code = self._base.copy()
        code.update(self._count.to_bytes(_COUNTER_BYTES, "big"))
        code.update(body)
        self._count += 1
        return code.digest()[:MAC_BYTES]

    def open(self, sealed: memoryview) -> memoryview:
        """The body of the next frame that was received.

        Args:
            sealed: Body and code.

        Raises:
            NotAuthentic: The code is wrong or missing.
        """
        body, code = sealed[:-MAC_BYTES], sealed[-MAC_BYTES:]
        number = self._count
        if len(sealed) < MAC_BYTES or not hmac.compare_digest(self.close(body), code):
            raise NotAuthentic(
                f"frame {number} of the peer is not authentic: the peer does not know the token, or something between "
                "the two sides changed, repeated or left out a frame",
                hint="configure the same token on both sides; if it is the same, somebody interferes with the network",
            )
        return body
