"""The protocol between one client and one server, as a state machine without I/O: it takes events, returns effects."""

from netloader.core.protocol.session import ClientTerms, ServerTerms, Session
from netloader.core.protocol.states import FINAL, Side, State
from netloader.core.protocol.table import TABLE, Row

__all__ = ["FINAL", "TABLE", "ClientTerms", "Row", "ServerTerms", "Session", "Side", "State"]
