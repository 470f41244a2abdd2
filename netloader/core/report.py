"""What a pull reports to its caller: progress while it runs, and a report at the end. Plain data, no I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from netloader.core.identity import ModelIdentity, name_of
from netloader.core.protocol.events import Announcement
from netloader.core.texts import LINE, byte_text, one_line
from netloader.errors import AttemptFailed, plural, without_source

__all__ = ["Phases", "Progress", "ProgressCallback", "PullReport", "SourceShare", "summary"]

_NAMED = 3
"""Most sources, and most failed ones, that a summary names. It counts the others."""

_SHOWN_NAME = 80
_SHOWN_REASON = 120
_WORTH_SAYING = 0.5
"""Seconds of waiting from which a summary mentions it."""

_SHOWN_KEYS = 5
"""Metadata entries up to which a report names them."""


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
        phases: Seconds by phase, summed over all sessions.
        sources: What each source gave, by address (text, or an :class:`~netloader.Address`), in the order of first use.
        retries: Number of failed attempts.
        attempts: The failed attempts. Repeated failures of one kind at one source are one entry.
        identity: Identity that the first accepted source stated. All other sources hold the same weights.
        announcement: What was pulled, ready to be announced to other clients: every block was verified against its
            digests.
        waited: Seconds in which no source had accepted the pull: none could be reached, or all were not ready,
            busy or had it in their queue.
        transfer_seconds: Seconds in which a channel to a source was open. What is left of `seconds` was spent on
            setting up: comparing what is held, opening channels, closing them.
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
    waited: float = 0.0
    transfer_seconds: float = 0.0

    @property
    def metadata(self) -> Mapping[str, str] | None:
        """What the weight files at the source say about themselves; None when the source does not state it."""
        return None if self.announcement is None else self.announcement.metadata

    @property
    def rate(self) -> float:
        """Bytes per second while channels were open; over the whole pull when that time is not known."""
        seconds = self.transfer_seconds or self.seconds
        return self.nbytes / seconds if seconds > 0 else 0.0

    def lines(self) -> list[str]:
        """The report as lines of text: the summary first, then the details."""
        phases: Mapping[str, float] = self.phases.as_dict()
        spent = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in phases.items())
        text = [summary(self), f"root {self.root}", f"phases: {spent}"]
        for source, share in self.sources.items():
            by = f" over {share.transport}" if share.transport else ""
            text.append(f"source {source}: {share.blocks} blocks, {share.nbytes / 1e6:.1f} MB{by}")
        if self.metadata is not None:
            names = f" ({', '.join(sorted(self.metadata))})" if 0 < len(self.metadata) <= _SHOWN_KEYS else ""
            text.append(f"metadata: {plural(len(self.metadata), 'entry', 'entries')}{names}")
        text.extend(f"failed before: {attempt}" for attempt in self.attempts)
        return text


def summary(report: PullReport) -> str:
    """One line about a pull that succeeded. It names each source once, and fewer of them if it would get too long.

    It says what was pulled, bytes, seconds, rate and waiting, from whom over which transport, and which sources were
    skipped or tried again and why.
    """
    text = ""
    for named in range(_NAMED, 0, -1):
        text = _summary(report, named)
        if len(text) <= LINE:
            break
    return text


def _summary(report: PullReport, named: int) -> str:
    identity, spent = report.identity, [f"{byte_text(report.rate)}/s"]
    if report.waited >= _WORTH_SAYING:
        spent += [f"transfer {report.transfer_seconds:.2f} s", f"waited {report.waited:.2f} s"]
    name = name_of(identity)
    of = f" of {one_line(name, _SHOWN_NAME)}" if name else ""
    what = f"{identity.role}, {plural(report.tensors, 'tensor')}"
    text = f"pulled {byte_text(report.nbytes)}{of} ({what}) in {report.seconds:.2f} s ({', '.join(spent)})"
    failed: dict[str, list[str]] = {}
    for attempt in report.attempts:
        failed.setdefault(attempt.source, []).append(_failed(attempt))
    shares = {source: share for source, share in report.sources.items() if share.blocks}
    gave = []
    for source, share in shares.items():
        over = f" over {share.transport}" if share.transport else ""
        notes = [plural(share.blocks, "block")] if len(shares) > 1 else []
        notes += [f"tried again: {why}" for why in failed.pop(source, ())]
        gave.append(one_line(source, _SHOWN_NAME) + over + (f" ({'; '.join(notes)})" if notes else ""))
    if gave:
        text += f" from {_some(gave, named)}"
    if failed:
        skipped = [f"{one_line(source, _SHOWN_NAME)} ({'; '.join(whys)})" for source, whys in failed.items()]
        text += f"; skipped {_some(skipped, named)}"
    return text


def _some(items: Sequence[str], named: int) -> str:
    more = len(items) - named
    return ", ".join(items[:named]) + (f" and {more} more" if more > 0 else "")


def _failed(attempt: AttemptFailed) -> str:
    why = one_line(without_source(attempt.cause.message, attempt.source), _SHOWN_REASON)
    return f"{why}, {attempt.times} times" if attempt.times > 1 else why
