"""Which announcement decides the root of a pull, and when it is taken back. No I/O.

The first source that is accepted pins root and plan, and every other source has to hold the same weights. Until a block
is verified this is only a claim. If every session that was accepted on this claim has ended, and none of them delivered
a verified block, the pin is taken back: a source that announces something and delivers nothing can't decide which
weights the others have to hold.
"""

from __future__ import annotations

from collections.abc import Iterator

from netloader.core import pull_events as p
from netloader.core.ledger import Ledger
from netloader.core.protocol.events import Announcement
from netloader.core.pull_state import FirstFiles, SessionState
from netloader.errors import (
    DigestMismatch,
    LocalProtocolError,
    ManifestError,
    NetloaderError,
    RefusedError,
    RootMismatch,
    VerificationError,
)

__all__ = ["Pinning"]


class Pinning:
    """Accepts or rejects announcements, one by one.

    Args:
        ledger: The ledger of the pull.
        adopts: Whether memory is allocated for what a source announces.

    Attributes:
        pins: How many pins were taken back.
    """

    def __init__(self, ledger: Ledger, *, adopts: bool) -> None:
        self._ledger = ledger
        self._adopts = adopts
        self._adopted = ""  # digest of the manifest that memory was allocated for
        self._allocating: SessionState | None = None
        self._queue: list[tuple[SessionState, Announcement]] = []
        self._holders: set[int] = set()  # accepted sessions that have not ended
        self._announcement: Announcement | None = None
        self._files = FirstFiles()
        self._proven = False
        self.pins = 0

    @property
    def allocating(self) -> bool:
        """Whether memory is being allocated."""
        return self._allocating is not None

    def announced(self, session: SessionState, announcement: Announcement) -> Iterator[p.Command]:
        """A source announced what it holds."""
        self._queue.append((session, announcement))
        yield from self._next()

    def allocated(self, error: NetloaderError | None) -> Iterator[p.Command]:
        """Allocating memory has ended.

        Raises:
            LocalProtocolError: No memory was being allocated.
        """
        if self._allocating is None:
            raise LocalProtocolError("memory was allocated without an Allocate command")
        self._allocating = None
        session, announcement = self._queue[0]
        if error is None:
            self._adopted = announcement.manifest_digest
            self._files.pin(announcement.metadata)
            if session.ended:
                yield from self._take_back()
        elif not session.ended:
            self._queue.pop(0)
            yield p.Reject(session.number, error)
        yield from self._next()

    def proven(self) -> Iterator[p.Command]:
        """A block was verified, or there is none to verify: what was announced is final, and may be passed on."""
        if not self._proven and self._announcement is not None:
            self._proven = True
            yield p.StartRelaying(self._announcement)

    def ended(self, session: SessionState) -> Iterator[p.Command]:
        """A session ended: if nothing was verified and no accepted session is left, take the pin back."""
        self._holders.discard(session.number)
        yield from self._take_back()

    def constrain(self, session: SessionState) -> None:
        """A session begins: its source has to hold what is pinned now."""
        if self._adopted or (self._ledger.plan is not None and not self._ledger.root_required):
            session.pin = self.pins

    def concerns(self, session: SessionState, error: NetloaderError | None) -> bool:
        """Whether a source was refused only because of what another one announced, which may be taken back."""
        code = error.code if isinstance(error, RefusedError) else ""
        of_root = isinstance(error, RootMismatch) or code == "root"
        of_memory = self._adopts and (isinstance(error, ManifestError) or code == "manifest")
        of_files = isinstance(error, VerificationError) and not isinstance(error, DigestMismatch)
        return session.pin is not None and not self._proven and (of_root or of_memory or of_files)

    def _take_back(self) -> Iterator[p.Command]:
        if self._proven or self._holders or self._allocating is not None:
            return
        if self._adopted or self._ledger.plan is not None:
            self.pins += 1
        self._announcement = None
        self._files = FirstFiles()
        self._ledger.unpin()
        if self._adopted:
            self._adopted = ""
            yield p.FreeMemory()

    def _next(self) -> Iterator[p.Command]:
        while self._queue and self._allocating is None:
            session, announcement = self._queue[0]
            if session.ended:
                self._queue.pop(0)
                continue
            if self._adopts and not self._adopted:
                self._allocating = session
                yield p.Allocate(session.number, announcement.manifest, announcement.metadata)
                return
            self._queue.pop(0)
            yield from self._pin(session, announcement)

    def _pin(self, session: SessionState, announcement: Announcement) -> Iterator[p.Command]:
        try:
            if self._adopted and announcement.manifest_digest != self._adopted:
                raise ManifestError(
                    "the source holds other tensors than those that memory was allocated for",
                    hint="give sources of one checkpoint only",
                )
            notes = self._files.compare(announcement.metadata)
            self._ledger.pin(announcement.root, announcement.plan, announcement.digests, str(session.source))
        except NetloaderError as error:
            self.constrain(session)
            yield p.Reject(session.number, error)
            return
        self._holders.add(session.number)
        self._announcement = self._announcement or announcement
        yield p.Accept(session.number)
        yield from (p.Log("info", f"{session.source}: {text}") for text in notes)
        if self._ledger.complete:  # there is no block to verify
            yield from self.proven()
