"""Checks that a client relays where it says so, before the server sends other clients there.

The server connects once to the address at which the client says that it relays, and asks what is held there. Only the
process that pulls here knows the random name that it gave as its own, and it announces something only once it has
verified a block. So the answer shows that the relay is this client, that it can be reached, and that it has blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from itertools import chain, repeat

import anyio

from netloader.core.addresses import Address
from netloader.core.protocol.events import Announcement
from netloader.errors import NetloaderError, RefusedError

__all__ = ["CheckRelay", "RelayCheck"]

_log = logging.getLogger("netloader")

CheckRelay = Callable[[Address, Announcement], Awaitable[str]]
"""Asks the relay at an address for its name. Raises NetloaderError if it relays something else or nothing."""

_SECONDS = 3.0
"""Seconds that one attempt may take."""

_PAUSES = (0.02, 0.05, 0.05, 0.1, 0.2, 0.2, 0.5, 0.5, 1.0, 2.0, 5.0)
"""Seconds before each attempt: the client may still be verifying its first block, and long when blocks are large. While
its relay answers "not ready", the last pause is repeated."""

_AT_ONCE = 8
"""Most checks that run at once."""


class RelayCheck:
    """The checks of one server.

    Args:
        ask: Asks a relay for its name; None where no relay can be asked: then no client is found to be one.
    """

    def __init__(self, ask: CheckRelay | None) -> None:
        self._ask = ask
        self._slots = anyio.Semaphore(_AT_ONCE)

    async def is_relay(self, address: Address, node: str, known: Announcement, label: str) -> bool:
        """Whether the client that gave `node` as its name relays what is `known` at `address`. Raises nothing.

        Args:
            address: Where the client says that it relays.
            node: Its name.
            known: What it pulls.
            label: Name of its session in the log.
        """
        if self._ask is None or not node:
            return False
        why, not_ready = "", False
        for number, pause in enumerate(chain(_PAUSES, repeat(_PAUSES[-1]))):
            if number >= len(_PAUSES) and not not_ready:
                break
            not_ready = False
            await anyio.sleep(pause)
            try:
                async with self._slots:
                    with anyio.fail_after(_SECONDS):
                        found = await self._ask(address, known)
            except TimeoutError:
                why = f"it did not answer within {_SECONDS:g} s"
            except NetloaderError as error:
                why = error.message
                not_ready = isinstance(error, RefusedError) and error.code in ("not-ready", "not-held")
            else:
                if found == node:
                    return True
                why = "another process answers there"
        _log.debug("%s: no client is sent to its relay at %s: %s", label, address, why)
        return False
