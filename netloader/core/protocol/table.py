"""The states of a session and the only table of legal moves.

House rules: whatever changes a state is in this table; the table does not know which side we are, the side is a value
in it. A pair of state and event that is not listed leads to FAILED. The two final states have no rows: an ended session
ignores what comes late. Any row may end in FAILED instead, when its handler finds a reason.
"""

from __future__ import annotations

import enum

from netloader.core import messages as m
from netloader.core.protocol import events as e

__all__ = ["FINAL", "TABLE", "Row", "Side", "State"]


class Side(enum.Enum):
    """Which end of the session."""

    SERVER = "server"
    CLIENT = "client"


class State(enum.Enum):
    """Where a session is."""

    LISTEN = "listen"
    VALIDATE = "validate"
    PLAN = "plan"
    TRANSFER = "transfer"
    FINALIZE = "finalize"
    DONE = "done"
    FAILED = "failed"


FINAL = frozenset({State.DONE, State.FAILED})

Row = tuple[Side, State, type]

_L, _V, _P, _T, _F = State.LISTEN, State.VALIDATE, State.PLAN, State.TRANSFER, State.FINALIZE
_WORKING = (_L, _V, _P, _T, _F)

_SERVER: dict[tuple[State, type], State] = {
    (_L, e.Connected): _L,
    (_L, m.Hello): _V,
    (_V, m.Identify): _V,
    (_V, e.Held): _V,
    (_V, e.Queued): _V,
    (_V, e.TurnTaken): _P,
    (_P, m.Agree): _P,
    (_P, e.ChannelOffered): _P,
    (_P, m.Signal): _P,
    (_P, e.SignalPosted): _P,
    (_P, m.Want): _P,  # the client's end of the channel may open first
    (_P, e.ChannelOpened): _T,
    (_P, m.Verdict): _F,  # a probe ends here
    (_T, m.Signal): _T,
    (_T, e.SignalPosted): _T,
    (_T, m.Want): _T,
    (_T, e.BlocksReady): _T,
    (_T, e.BlocksGone): _T,
    (_T, e.BlocksSent): _T,
    (_P, e.UpstreamChanged): _P,
    (_T, e.UpstreamChanged): _T,
    (_F, e.UpstreamChanged): _F,
    (_T, m.Verdict): _F,
    (_F, e.BlocksReady): _F,  # asked for before the verdict; the client no longer waits for them
    (_F, e.BlocksGone): _F,
    (_F, e.BlocksSent): _F,
    (_F, e.ChannelOffered): _F,
    (_F, e.ChannelOpened): _F,
    (_F, m.Signal): _F,
    (_F, e.SignalPosted): _F,
    (_F, e.ChannelFailed): _F,  # the client may close its end first
    (_F, e.NotHeld): _F,  # retracted, but the client needs nothing more
    (_F, m.Goodbye): _F,  # the client did not wait for ours
    (_F, e.ChannelDown): State.DONE,
}

_CLIENT: dict[tuple[State, type], State] = {
    (_L, e.Connected): _L,
    (_L, m.Welcome): _V,
    (_V, m.Waiting): _V,
    (_V, m.Accepted): _P,
    (_P, m.Announce): _P,
    (_P, e.Examined): _P,
    (_P, e.Pinned): _P,
    (_P, e.PinRefused): State.FAILED,
    (_P, m.ChannelOffer): _P,
    (_P, m.Signal): _P,
    (_P, e.SignalPosted): _P,
    (_P, e.ChannelOpened): _T,
    (_P, e.Finished): _F,  # a probe, or other sessions were faster
    (_T, m.Signal): _T,
    (_T, e.SignalPosted): _T,
    (_T, e.BlocksWanted): _T,
    (_T, m.Grant): _T,
    (_T, m.Gone): _T,
    (_P, m.Upstream): _P,
    (_T, m.Upstream): _T,
    (_F, m.Upstream): _F,
    (_T, e.BlocksReceived): _T,
    (_T, e.BlocksRejected): State.FAILED,
    (_T, e.Finished): _F,
    (_F, m.Announce): _F,  # what was under way when the client had enough
    (_F, m.ChannelOffer): _F,
    (_F, m.Signal): _F,
    (_F, m.Grant): _F,
    (_F, m.Gone): _F,
    (_F, e.Examined): _F,
    (_F, e.Pinned): _F,
    (_F, e.PinRefused): _F,
    (_F, e.SignalPosted): _F,
    (_F, e.ChannelOpened): _F,
    (_F, e.BlocksWanted): _F,
    (_F, e.BlocksReceived): _F,
    (_F, e.BlocksRejected): _F,
    (_F, e.Finished): _F,  # each AskForWork may find that there is nothing left
    (_F, e.ChannelFailed): _F,
    (_F, m.Goodbye): _F,
    (_F, e.ChannelDown): State.DONE,
}

# The other endings are alike wherever they happen.
for _state in _WORKING:
    for _moves in (_SERVER, _CLIENT):
        _moves[_state, e.ConnectionLost] = State.FAILED
        _moves[_state, e.Garbled] = State.FAILED
        _moves[_state, e.TimedOut] = State.FAILED
        _moves[_state, e.Cancelled] = State.FAILED
    _CLIENT[_state, m.Refusal] = State.FAILED
    if _state is not _F:
        _SERVER[_state, m.Goodbye] = State.FAILED
        _CLIENT[_state, m.Goodbye] = State.FAILED
# Expected once the server has said goodbye; FAILED before that.
_CLIENT[_F, e.ConnectionLost] = _F
_SERVER[_F, e.ConnectionLost] = _F
for _state in (_P, _T):
    _SERVER[_state, e.ChannelFailed] = State.FAILED
    _CLIENT[_state, e.ChannelFailed] = State.FAILED
for _state in (_L, _V, _P, _T):
    _SERVER[_state, e.NotHeld] = State.FAILED  # not there, retracted, or this side is stopping

TABLE: dict[Row, State] = {
    **{(Side.SERVER, state, kind): after for (state, kind), after in _SERVER.items()},
    **{(Side.CLIENT, state, kind): after for (state, kind), after in _CLIENT.items()},
}
"""Side, state and kind of event -> next state."""
