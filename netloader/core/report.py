"""What a pull reports to its caller: progress while it runs, and a report at the end. Plain data, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from netloader.core.identity import ModelIdentity
from netloader.core.protocol.events import Announcement
from netloader.errors import AttemptFailed

__all__ = ["Phases", "Progress", "ProgressCallback", "PullReport", "SourceShare"]


_SHOWN_KEYS = 5


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pull is.

    Attributes:
        verified: Bytes verified so far.
        total: Bytes of the whole pull.
        seconds: Seconds since the pull began.
        source: Address of the source that sent the last verified block.
    """

    verified: int
    total: int
    seconds: float
    source: str


ProgressCallback = Callable[[Progress], None]
"""Called in the event loop's thread each time blocks were verified. It must return quickly."""


@dataclass(slots=True)
class Phases:
    """Seconds by phase, summed over all sessions of a pull.

    Attributes:
        connect: Until Hello and Welcome were exchanged.
        validate: Until the server accepted, including the wait for a turn.
        plan: Until the channel was open.
        transfer: Until the last block was verified.
        verify: Time spent hashing. It is part of `transfer`, in worker threads.
        finalize: Verdict, goodbye, closing.
    """

    connect: float = 0.0
    validate: float = 0.0
    plan: float = 0.0
    transfer: float = 0.0
    verify: float = 0.0
    finalize: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """Name of each phase -> seconds."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class SourceShare:
    """What one source gave.

    Attributes:
        blocks: Blocks verified.
        nbytes: Their bytes.
        transport: Name of the transport; empty when none was opened.
    """

    blocks: int = 0
    nbytes: int = 0
    transport: str = ""


@dataclass(slots=True)
class PullReport:
    """The result of a pull.

    Attributes:
        root: Root of the weights, in hex.
        nbytes: Bytes pulled and verified.
        blocks: Blocks pulled and verified.
        tensors: Tensors in the manifest.
        seconds: Duration of the whole pull.
        phases: Seconds by phase.
        sources: What each source gave, by address, in the order of first use.
        retries: Number of failed attempts.
        attempts: The failed attempts. Repeated failures of one kind at one source are one entry.
        identity: Identity that the first accepted source stated. All other sources hold the same weights.
        announcement: What was pulled, ready to be announced to other clients: every block was verified against its
            digests.
    """

    root: str = ""
    nbytes: int = 0
    blocks: int = 0
    tensors: int = 0
    seconds: float = 0.0
    phases: Phases = field(default_factory=Phases)
    sources: dict[str, SourceShare] = field(default_factory=dict)
    retries: int = 0
    attempts: tuple[AttemptFailed, ...] = ()
    identity: ModelIdentity = field(default_factory=ModelIdentity)
    announcement: Announcement | None = None

    @property
    def metadata(self) -> Mapping[str, str] | None:
        """What the weight files at the source say about themselves; None when the source does not state it."""
        return None if self.announcement is None else self.announcement.metadata

    @property
    def rate(self) -> float:
        """Bytes per second over the whole pull."""
        return self.nbytes / self.seconds if self.seconds > 0 else 0.0

    def lines(self) -> list[str]:
        """The report as lines of text."""
        phases: Mapping[str, float] = self.phases.as_dict()
        spent = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in phases.items())
        text = [
            (
                f"pulled {self.nbytes / 1e6:.1f} MB in {self.tensors} tensors, {self.blocks} blocks, "
                f"in {self.seconds:.2f} s ({self.rate / 1e6:.0f} MB/s)"
            ),
            f"root {self.root}",
            f"phases: {spent}",
        ]
        for source, share in self.sources.items():
            by = f" over {share.transport}" if share.transport else ""
            text.append(f"source {source}: {share.blocks} blocks, {share.nbytes / 1e6:.1f} MB{by}")
        if self.metadata is not None:
            entries = len(self.metadata)
            names = f" ({', '.join(sorted(self.metadata)[:_SHOWN_KEYS])})" if 0 < entries <= _SHOWN_KEYS else ""
            text.append(f"metadata: {entries} {'entry' if entries == 1 else 'entries'}{names}")
        text.extend(f"failed before: {attempt}" for attempt in self.attempts)
        return text
