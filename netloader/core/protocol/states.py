"""The sides and the states of a session."""

from __future__ import annotations

import enum

__all__ = ["FINAL", "Side", "State"]


class Side(enum.Enum):
    """Which end of the session."""

    SERVER = "server"
    CLIENT = "client"


class State(enum.Enum):
    """The state of a session."""

    LISTEN = "listen"
    VALIDATE = "validate"
    PLAN = "plan"
    TRANSFER = "transfer"
    FINALIZE = "finalize"
    DONE = "done"
    FAILED = "failed"


FINAL = frozenset({State.DONE, State.FAILED})
"""The states in which a session has ended. It ignores all later events."""
