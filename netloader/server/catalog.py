"""The holdings of a server by role and layout, and the refusals where it holds nothing. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from netloader.core.identity import Layout, Role, check_sendable
from netloader.core.protocol.events import Held, NotHeld
from netloader.errors import LocalProtocolError
from netloader.server.offers import SentBlocks
from netloader.session.holding import Holding
from netloader.session.relay_progress import Supply

__all__ = ["Holdings", "announced_bytes"]

_TENSOR_BYTES = 100
"""About how many bytes of an announcement are about one tensor."""


@dataclass(frozen=True, slots=True)
class _Absent:
    """Nothing is served under a role and layout; `reply` is the refusal for clients."""

    reply: NotHeld


class Holdings:
    """The catalog of a server: at most one holding for each role and layout."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Role, Layout], Holding | _Absent] = {}
        self._supplies: dict[tuple[Role, Layout], Supply | None] = {}
        self._sent: dict[tuple[Role, Layout], SentBlocks] = {}

    def add(self, holding: Holding, supply: Supply | None = None) -> None:
        """Serve `holding` under its own role and layout.

        Replaces what :meth:`expect`, :meth:`refuse` or :meth:`retract` set.

        Args:
            holding: The holding.
            supply: Progress of the pull that fills it; None when all blocks are there.

        Raises:
            ConfigError: A text of its identity can't be sent.
            LocalProtocolError: Other tensors are served under this role and layout.
        """
        identity = holding.announcement.identity
        check_sendable(identity)
        key = (identity.role, identity.layout)
        if isinstance(self._entries.get(key), _Absent | None):
            self._entries[key] = holding
            self._supplies[key] = supply
            self._sent[key] = SentBlocks()
            return
        raise LocalProtocolError(
            f"{identity.layout} tensors are already served for role {identity.role!r}", hint="retract them first"
        )

    def expect(self, role: Role, layout: Layout, reason: str, retry_after: float) -> None:
        """Refuse clients with "not ready" until :meth:`add`. Does nothing while a holding is served."""
        reply = NotHeld("not-ready", reason, hint="a client tries again while its WAIT lasts", retry_after=retry_after)
        # A new load replaces the refusal or retraction of the previous one.
        if isinstance(self._entries.get((role, layout)), _Absent | None):
            self._entries[role, layout] = _Absent(reply)

    def refuse(self, role: Role, layout: Layout, reason: str, hint: str) -> None:
        """Refuse clients with "not held", and this reason, under this role and layout."""
        self._entries[role, layout] = _Absent(NotHeld("not-held", reason, hint=hint))

    def retract(self, role: Role, reason: str, sources: tuple[str, ...] = ()) -> tuple[Holding, ...]:
        """Stop serving everything under `role`.

        Returns:
            The holdings that were served until now.
        """
        held = []
        for key, entry in self._entries.items():
            if key[0] == role:
                self._entries[key] = _Absent(
                    NotHeld("gone", reason, hint="pull from another source", retry_after=5.0, sources=sources)
                )
                self._supplies.pop(key, None)
                self._sent.pop(key, None)
                if not isinstance(entry, _Absent):
                    held.append(entry)
        return tuple(held)

    def held(self) -> tuple[Holding, ...]:
        """The holdings that are served now."""
        return tuple(entry for entry in self._entries.values() if not isinstance(entry, _Absent))

    def holds(self, holding: Holding) -> bool:
        """Whether this very object is served now."""
        return any(entry is holding for entry in self._entries.values())

    def why_gone(self, holding: Holding) -> tuple[str, tuple[str, ...]]:
        """Why `holding` is not served any more, and other sources of the same weights."""
        identity = holding.announcement.identity
        entry = self._entries.get((identity.role, identity.layout))
        if isinstance(entry, _Absent):
            return entry.reply.reason, entry.reply.sources
        return "other weights are served here now", ()

    def supply_of(self, holding: Holding) -> Supply | None:
        """Progress of the pull that fills `holding`; None when all blocks are there, or it is not served any more."""
        identity = holding.announcement.identity
        return self._supplies.get((identity.role, identity.layout)) if self.holds(holding) else None

    def sent_of(self, holding: Holding) -> SentBlocks:
        """The blocks of `holding` that were sent to clients that relay."""
        identity = holding.announcement.identity
        sent = self._sent.get((identity.role, identity.layout)) if self.holds(holding) else None
        return SentBlocks() if sent is None else sent

    def find(self, role: Role, layouts: Sequence[Layout]) -> tuple[Held | NotHeld, Holding | None]:
        """Find the holding under `role` in the first of `layouts` that is served.

        Returns:
            The answer for the session, and the holding itself when there is one.
        """
        absent: NotHeld | None = None
        for layout in layouts:
            entry = self._entries.get((role, layout))
            if entry is None:
                continue
            if not isinstance(entry, _Absent):
                return Held(entry.announcement), entry
            absent = absent or entry.reply
        if absent is not None:
            return absent, None
        held = [f"{r} in layout {lay}" for (r, lay), entry in self._entries.items() if not isinstance(entry, _Absent)]
        hint = "start both sides alike"
        if any("checkpoint" in text for text in held):
            hint = "a checkpoint server feeds `netloader pull`; an engine needs a source that is an engine"
        wanted = " or ".join(layouts) or "any layout"
        holds = ", ".join(held) or "nothing yet"
        return NotHeld("not-held", f"nothing is held for {role} in {wanted}; held: {holds}", hint=hint), None


def announced_bytes(holding: Holding) -> int:
    """About how many bytes the announcement of `holding` has."""
    known = holding.announcement
    return len(known.digests) + _TENSOR_BYTES * len(known.manifest.tensors)
