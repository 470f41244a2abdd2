"""What a pull tells its caller: progress while it runs, and an account at the end. Plain data, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from netloader.core.identity import ModelIdentity
from netloader.core.protocol.events import Announcement
from netloader.errors import AttemptFailed

__all__ = ["Phases", "Progress", "ProgressCallback", "PullReport", "SourceShare"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pull is.

    Attributes:
        verified: Bytes that are in place and checked.
        total: Bytes in all.
        seconds: Since the pull began.
        source: Where the last of them came from.
    """

    verified: int
    total: int
    seconds: float
    source: str


ProgressCallback = Callable[[Progress], None]
"""Called in the event loop's thread each time blocks were verified; has to be quick."""


@dataclass(slots=True)
class Phases:
    """Seconds by phase, summed over all sessions of a pull.

    Attributes:
        connect: Until the greeting was over.
        validate: Until the server accepted, waiting for a turn included.
        plan: Until the channel was open.
        transfer: Until the last block was in place and checked.
        verify: Spent hashing; happens within `transfer`, in worker threads.
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
    """Account of a pull.

    Attributes:
        root: Root of the weights, in hex.
        nbytes: Bytes pulled and verified.
        blocks: Blocks pulled and verified.
        tensors: Tensors in the manifest.
        seconds: Whole time.
        phases: Seconds by phase.
        sources: What each source gave, by address, in the order of first use.
        retries: Tries that failed on the way.
        attempts: How they failed; what a source said again and again is there once.
        identity: What the source that was accepted first said that it holds; all others hold the same weights.
        announcement: What was pulled, as it can be announced in turn: every block was verified against its digests.
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
    def rate(self) -> float:
        """Bytes per second over the whole time."""
        return self.nbytes / self.seconds if self.seconds > 0 else 0.0

    def lines(self) -> list[str]:
        """The report for people, a line each."""
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
        text.extend(f"failed before: {attempt}" for attempt in self.attempts)
        return text
