"""The transition table of a session: side, state and type of event -> handler and next state.

A pair of state and event without a row leads to FAILED. A row also leads to FAILED when its handler raises.
The two final states have no rows: an ended session ignores all later events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from netloader.core import messages as m
from netloader.core.protocol import effects as f
from netloader.core.protocol import events as e
from netloader.core.protocol import finalize, listen, planning, transfer, validate
from netloader.core.protocol.context import Context
from netloader.core.protocol.states import FINAL, Side, State

__all__ = ["LATE", "TABLE", "Handler", "Row"]

Handler = Callable[[Context, Any], Sequence[f.Effect]]
Row = tuple[Side, State, type]

_SERVER, _CLIENT = Side.SERVER, Side.CLIENT
_L, _V, _P, _T, _F = _WORKING = [state for state in State if state not in FINAL]

_ENDINGS: Mapping[type, Handler] = {
    e.ConnectionLost: finalize.connection_lost,
    e.Failed: finalize.failed,
    e.WorkFailed: finalize.failed,
    e.TimedOut: finalize.timed_out,
    e.Cancelled: finalize.gave_up,
    m.Goodbye: finalize.left,
}
"""Events that end a session in any state and on either side, except where a row below says otherwise."""

LATE: Mapping[Side, frozenset[type]] = {
    _SERVER: frozenset({m.Signal, m.Goodbye, e.BlocksReady, e.BlocksGone, e.BlocksSent, e.UpstreamChanged, e.NotHeld,
                        e.BlocksOffered,
                        e.ChannelOffered, e.ChannelOpened, e.SignalPosted, e.WorkFailed}),
    _CLIENT: frozenset({m.Announce, m.ChannelOffer, m.Signal, m.Grant, m.Gone, m.Upstream, m.Progress,
                        e.Examined, e.Pinned, e.ChannelOpened, e.SignalPosted, e.BlocksWanted, e.BlocksReceived,
                        e.Finished, e.WorkFailed}),
}  # fmt: skip
"""Events that are ignored in FINALIZE, because they were in flight when the client finished."""

TABLE: Mapping[Row, tuple[Handler, State]] = {
    **{
        (side, state, kind): (end, State.FAILED)
        for side in Side
        for state in _WORKING
        for kind, end in _ENDINGS.items()
    },
    **{(_CLIENT, state, m.Refusal): (finalize.refused, State.FAILED) for state in _WORKING},
    **{(_SERVER, state, e.NotHeld): (validate.server_not_held, State.FAILED) for state in _WORKING},
    **{(side, _F, kind): (finalize.late, _F) for side in Side for kind in LATE[side]},
    (_SERVER, _L, e.Connected): (listen.server_connected, _L),
    (_SERVER, _L, m.Hello): (listen.server_hello, _V),
    (_SERVER, _V, m.Identify): (validate.server_identify, _V),
    (_SERVER, _V, e.Held): (validate.server_held, _V),
    (_SERVER, _V, e.Queued): (validate.server_queued, _V),
    (_SERVER, _V, e.TurnTaken): (validate.server_turn, _P),
    (_SERVER, _P, m.Agree): (planning.server_agree, _P),
    (_SERVER, _P, e.ChannelOffered): (planning.server_offered, _P),
    (_SERVER, _P, m.Signal): (planning.signal_came, _P),
    (_SERVER, _P, e.SignalPosted): (planning.signal_posted, _P),
    (_SERVER, _P, e.UpstreamChanged): (planning.server_upstream, _P),
    (_SERVER, _P, e.BlocksOffered): (transfer.server_offered_early, _P),
    (_SERVER, _P, m.Want): (transfer.server_early_want, _P),  # the client's end of the channel may open first
    (_SERVER, _P, e.ChannelOpened): (transfer.server_open, _T),
    (_SERVER, _P, m.Verdict): (finalize.server_verdict, _F),  # a probe ends here
    (_SERVER, _T, m.Signal): (planning.signal_came, _T),
    (_SERVER, _T, e.SignalPosted): (planning.signal_posted, _T),
    (_SERVER, _T, e.UpstreamChanged): (planning.server_upstream, _T),
    (_SERVER, _T, e.BlocksOffered): (transfer.server_offered_blocks, _T),
    (_SERVER, _T, m.Want): (transfer.server_want, _T),
    (_SERVER, _T, e.BlocksReady): (transfer.server_ready, _T),
    (_SERVER, _T, e.BlocksGone): (transfer.server_gone, _T),
    (_SERVER, _T, e.BlocksSent): (transfer.server_sent, _T),
    (_SERVER, _T, m.Verdict): (finalize.server_verdict, _F),
    (_SERVER, _F, e.ConnectionLost): (finalize.lost_late, _F),
    (_SERVER, _F, e.ChannelDown): (finalize.closed, State.DONE),
    (_CLIENT, _L, e.Connected): (listen.client_connected, _L),
    (_CLIENT, _L, m.Welcome): (listen.client_welcome, _V),
    (_CLIENT, _V, m.Waiting): (validate.client_waiting, _V),
    (_CLIENT, _V, m.Accepted): (validate.client_accepted, _P),
    (_CLIENT, _P, m.Announce): (planning.client_announce, _P),
    (_CLIENT, _P, e.Examined): (planning.client_examined, _P),
    (_CLIENT, _P, e.Pinned): (planning.client_pinned, _P),
    (_CLIENT, _P, m.ChannelOffer): (planning.client_offer, _P),
    (_CLIENT, _P, m.Signal): (planning.signal_came, _P),
    (_CLIENT, _P, e.SignalPosted): (planning.signal_posted, _P),
    (_CLIENT, _P, m.Upstream): (planning.client_upstream, _P),
    (_CLIENT, _P, m.Progress): (transfer.client_progress, _P),
    (_CLIENT, _P, e.ChannelOpened): (planning.client_open, _T),
    (_CLIENT, _P, e.Finished): (finalize.client_finished, _F),  # a probe, or other sessions were faster
    (_CLIENT, _T, m.Signal): (planning.signal_came, _T),
    (_CLIENT, _T, e.SignalPosted): (planning.signal_posted, _T),
    (_CLIENT, _T, m.Upstream): (planning.client_upstream, _T),
    (_CLIENT, _T, m.Progress): (transfer.client_progress, _T),
    (_CLIENT, _T, e.BlocksWanted): (transfer.client_wanted, _T),
    (_CLIENT, _T, m.Grant): (transfer.client_grant, _T),
    (_CLIENT, _T, m.Gone): (transfer.client_gone, _T),
    (_CLIENT, _T, e.BlocksReceived): (transfer.client_received, _T),
    (_CLIENT, _T, e.Finished): (finalize.client_finished, _F),
    (_CLIENT, _F, m.Goodbye): (finalize.client_goodbye, _F),
    (_CLIENT, _F, e.ConnectionLost): (finalize.lost_late, _F),
    (_CLIENT, _F, e.ChannelDown): (finalize.closed, State.DONE),
}
"""Side, state and type of event -> handler and next state. A later line overrides an earlier one."""
