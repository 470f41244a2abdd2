"""The conversation between one client and one server, as a pure state machine: events in, effects out, no I/O."""

from netloader.core.protocol.session import ClientTerms, ServerTerms, Session
from netloader.core.protocol.states import FINAL, Side, State
from netloader.core.protocol.table import TABLE, Row

__all__ = ["FINAL", "TABLE", "ClientTerms", "Row", "ServerTerms", "Session", "Side", "State"]
