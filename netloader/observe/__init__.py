"""Events of pulls and servers, for metrics, logs and progress displays."""

from __future__ import annotations

from netloader.observe.base import Observer, Observers
from netloader.observe.events import (
    BlocksSent,
    BlocksVerified,
    Event,
    PhaseEnded,
    PullBegan,
    PullEnded,
    ServingStarted,
    ServingStopped,
    SessionBegan,
    SessionEnded,
    SourceChosen,
    SourceLeft,
    SourceWaiting,
    TransportChosen,
)

__all__ = [
    "BlocksSent",
    "BlocksVerified",
    "Event",
    "Observer",
    "Observers",
    "PhaseEnded",
    "PullBegan",
    "PullEnded",
    "ServingStarted",
    "ServingStopped",
    "SessionBegan",
    "SessionEnded",
    "SourceChosen",
    "SourceLeft",
    "SourceWaiting",
    "TransportChosen",
]
