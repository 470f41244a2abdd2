"""What a server says of one of its sessions."""

from __future__ import annotations

from dataclasses import dataclass

from netloader.core.protocol import State

__all__ = ["SessionInfo"]


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A snapshot of one session.

    Attributes:
        peer: Address of the client.
        state: State of the session.
        role: Role that the client asked for; empty before it asked.
        transport: Name of the transport; empty before one was chosen.
        blocks: Blocks sent.
        nbytes: Their bytes.
        unfinished: Blocks that were being sent when a send failed. Some of them may have arrived.
    """

    peer: str
    state: State
    role: str
    transport: str
    blocks: int
    nbytes: int
    unfinished: int = 0
