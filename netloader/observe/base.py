"""The contract of an observer, and how events are handed to several of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol

from netloader.observe.events import Event

__all__ = ["Observer", "Observers"]

_log = logging.getLogger("netloader")


class Observer(Protocol):
    """Is told what happens in a pull or a server: any function that takes an event.

    It is called in the thread of the event loop, between two of its steps, so it must be quick (microseconds) and must
    not block: what takes longer belongs into a queue and another thread. Events come in the order in which things
    happened. One observer may be given to several pulls and servers; those of ``netloader.sync`` have a thread each.

    An observer ignores events that it does not know: later releases add some.

    An observer that raises never breaks what it observes: the exception is logged once, and the pull or server tells
    it nothing more.
    """

    def __call__(self, event: Event, /) -> None:
        """Take note of `event`, which nobody changes any more."""
        ...


class Observers:
    """Hands each event to several observers, in their order.

    Args:
        observers: Who is told.
    """

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = tuple(observers)

    def __call__(self, event: Event) -> None:
        """Tell all of them; never raises an `Exception`."""
        for observer in self._observers:
            try:
                observer(event)
            except Exception:  # noqa: BLE001 - another one's code: it may cost the observer, nothing else
                self._observers = tuple(one for one in self._observers if one is not observer)
                name = getattr(observer, "__qualname__", type(observer).__name__)
                _log.exception("observer %s failed, and is told nothing more", name)
