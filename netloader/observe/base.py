"""The contract of an observer, and a group of observers that receive each event."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol

from netloader.observe.events import Event

__all__ = ["Observer", "Observers"]

_log = logging.getLogger("netloader")


class Observer(Protocol):
    """Receives the events of a pull or a server: any function that takes an event.

    It is called on the thread of the event loop, so it must return within microseconds and must not block. Longer work
    belongs in another thread, behind a queue. Events arrive in the order in which they happened. One observer may be
    given to several pulls and servers; each of those of ``netloader.sync`` calls it from its own thread.

    An observer must ignore events that it does not know, because later releases add some.

    An observer that raises does not affect the pull or server: the exception is logged once, and the observer receives
    no more events.
    """

    def __call__(self, event: Event, /) -> None:
        """Receive `event`. It is never changed afterwards."""
        ...


class Observers:
    """Hands each event to several observers, in their order.

    Args:
        observers: The observers.
    """

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = tuple(observers)

    def __call__(self, event: Event) -> None:
        """Call each observer. Raises no `Exception`."""
        for observer in self._observers:
            try:
                observer(event)
            except Exception:  # noqa: BLE001 - third-party code: it may affect this observer only
                self._observers = tuple(one for one in self._observers if one is not observer)
                name = getattr(observer, "__qualname__", type(observer).__name__)
                _log.exception("observer %s failed, and is told nothing more", name)
