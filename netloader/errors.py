"""Every error that netloader raises.

One base, :class:`NetloaderError`, so that a caller needs a single ``except``. Below it, families named by who caused
the error: the caller's configuration or tensors, the peer's behaviour, a peer's refusal, the transport, the contents.
Each error carries ``hint``, one sentence that says what to do, and ``story``, the last moves of the session that
failed (never tensor contents).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

__all__ = [
    "AttemptFailed",
    "ChannelBusy",
    "ChannelClosed",
    "CheckpointError",
    "ConfigError",
    "DigestMismatch",
    "DiscoveryError",
    "LocalProtocolError",
    "ManifestError",
    "MemoryStillInUse",
    "NetloaderError",
    "NoSourceLeft",
    "PeerLost",
    "ProtocolError",
    "RefusedError",
    "RemoteProtocolError",
    "RootMismatch",
    "TransferTimeout",
    "TransportError",
    "TransportUnavailable",
    "VerificationError",
]

_SHOWN_PROBLEMS = 20
_SHOWN_NAMES = 3


class NetloaderError(Exception):
    """Base of every error of this library.

    Args:
        message: What was wrong, with the value.
        hint: What to do about it; one sentence.

    Attributes:
        hint: As given; empty when there is nothing useful to advise.
        story: The last moves of the session concerned, oldest first.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        self.story: tuple[str, ...] = ()

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} ({self.hint})" if self.hint else message

    @property
    def message(self) -> str:
        """The text without the hint."""
        return super().__str__()


def shown(value: object, limit: int = 200) -> str:
    """Return `value` as a message shows it: its ``repr``, cut at `limit` characters.

    Some values have none (an integer of thousands of digits, a list nested very deep); those are named by type.
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"<{type(value).__name__} too large to show>"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class ConfigError(NetloaderError):
    """A configuration field has a value that is not allowed.

    Args:
        field: Name of the field, as the user writes it (``SOURCE[1].sources[0]``).
        value: The value found.
        allowed: What would have been accepted.
        reason: What exactly is wrong, when `allowed` alone does not say it.
        hint: What to do; defaults to none.
    """

    def __init__(self, *, field: str, value: object, allowed: str, reason: str | None = None, hint: str = "") -> None:
        why = f": {reason}" if reason else ""
        super().__init__(f"{field} = {shown(value)} is not valid{why}; allowed: {allowed}", hint=hint)
        self.field = field
        self.value = value
        self.allowed = allowed
        self.reason = reason


class ManifestError(NetloaderError):
    """Tensors cannot be described, or two manifests do not describe the same tensors.

    Args:
        message: Summary.
        problems: One line for each tensor concerned.
        hint: What to do.
    """

    def __init__(self, message: str, *, problems: Sequence[str] = (), hint: str = "") -> None:
        shown = list(problems[:_SHOWN_PROBLEMS])
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        super().__init__("; ".join([message, *shown]) if shown else message, hint=hint)
        self.problems = tuple(problems)


class CheckpointError(NetloaderError):
    """The files of a checkpoint are missing, damaged, or can't be written. The message names the file."""


class DiscoveryError(NetloaderError):
    """Sources can't be found, published or claimed: the backend of a provider failed, or says what makes no sense."""


class ProtocolError(NetloaderError):
    """The control conversation broke its rules."""


class LocalProtocolError(ProtocolError):
    """This side asked for something that is not legal in the session's state: a bug in the caller."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something that is malformed, too large, or not legal in the session's state."""


class RefusedError(NetloaderError):
    """The peer refused, and said why.

    Args:
        code: Which kind of refusal (see :class:`netloader.core.messages.RefusalCode`).
        message: The peer's reason.
        hint: The peer's advice.
        retry_after: Seconds after which the peer suggests another try, or None when trying again is pointless.
        sources: Where the peer says that it may be had instead.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        hint: str = "",
        retry_after: float | None = None,
        sources: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.retry_after = retry_after
        self.sources = sources


class TransportError(NetloaderError):
    """The data path failed. The channel is unusable afterwards."""


class PeerLost(TransportError):
    """The peer went away: its process ended, or the connection was cut. Raised for control and data connections."""


class TransferTimeout(TransportError):
    """A wait passed its deadline."""


class ChannelClosed(TransportError):
    """The channel was closed on this side."""


class ChannelBusy(TransportError):
    """Two operations were started on one direction of a channel at the same time: a bug in the caller."""


class _Thread(Protocol):
    """What is told about a thread."""

    @property
    def name(self) -> str: ...

    def is_alive(self) -> bool: ...


class MemoryStillInUse(TransportError):
    """Memory that was lent to a transport can't be had back: a thread that was told to return did not.

    After a receive it may write there at any later time. So a pull that meets this has failed for good: no other source
    and no other loader may fill the same memory, and the process has to end. After a send it only reads.

    Args:
        what: The channel.
        threads: Those that did not return; none where no thread of ours is concerned.
        writes: Whether they may write.
        seconds: For how long they were waited for.

    Attributes:
        threads: Names of the threads.
        writes: As given.
    """

    def __init__(self, what: str, threads: Sequence[_Thread] = (), *, writes: bool, seconds: float) -> None:
        self._threads = tuple(threads)
        self.threads = tuple(thread.name for thread in threads)
        self.writes = writes
        who = f"thread {', '.join(self.threads)}" if threads else "an operation"
        does, hint = "may still read the memory being sent", "leave this memory as it is, or end this process"
        if writes:
            does = "may still write into the memory that is being filled"
            hint = "end this process: nothing else can fill this memory while it runs"
        super().__init__(f"{what}: {who} {does}: it was told to return and did not within {seconds:g} s", hint=hint)

    @property
    def lasts(self) -> bool:
        """Whether it is still so, as far as is known."""
        return not self._threads or any(thread.is_alive() for thread in self._threads)


class TransportUnavailable(TransportError):
    """No transport that both sides have can run here, or the one asked for is unknown or not installed."""


class VerificationError(NetloaderError):
    """What arrived is not what the server announced."""


class DigestMismatch(VerificationError):
    """A block's bytes do not have the digest that the server announced.

    Args:
        block: Number of the block.
        tensors: Names of the tensors it holds bytes of.
        expected: Digest announced, in hex.
        actual: Digest of what landed in memory, in hex.
    """

    def __init__(self, block: int, tensors: Sequence[str], expected: str, actual: str) -> None:
        more = len(tensors) - _SHOWN_NAMES
        names = ", ".join(tensors[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
        super().__init__(
            f"block {block} ({names}) arrived with digest {actual}, announced was {expected}",
            hint="the source or the network corrupts data: check both before using this source again",
        )
        self.block = block
        self.tensors = tuple(tensors)
        self.expected = expected
        self.actual = actual


class RootMismatch(VerificationError):
    """A source holds other weights than the ones this pull is pinned to.

    Args:
        expected: The pinned root, in hex.
        actual: The root that the source announced, in hex.
        pinned_by: Where the pinned root came from (``EXPECT_ROOT``, or an address).
    """

    def __init__(self, expected: str, actual: str, pinned_by: str) -> None:
        super().__init__(
            f"the source holds root {actual}, but this pull is pinned to root {expected} (by {pinned_by})",
            hint="the two hold different weights of equal shape; give sources of one checkpoint only",
        )
        self.expected = expected
        self.actual = actual


class AttemptFailed(NetloaderError):
    """One try at one source failed; a line in the account of a pull.

    Args:
        source: The address.
        cause: What happened there.
        times: Tries that failed there in this way; `cause` is of the last one.
    """

    def __init__(self, source: str, cause: NetloaderError, times: int = 1) -> None:
        super().__init__(f"{source}: {cause.message}", hint=cause.hint)
        self.source = source
        self.cause = cause
        self.times = times
        self.story = cause.story


class NoSourceLeft(NetloaderError):
    """A pull failed: no source could give all blocks.

    Args:
        attempts: Every try that failed, in order.
        verified: Bytes that were verified before the pull gave up.
        total: Bytes that the pull needed, or None when no manifest was agreed.
    """

    def __init__(self, attempts: Sequence[AttemptFailed], *, verified: int = 0, total: int | None = None) -> None:
        of_total = "" if total is None else f" ({verified} of {total} bytes were verified)"
        told = (f"{a.message} ({a.times} times)" if a.times > 1 else a.message for a in attempts)
        tries = "; ".join(told) or "no source was given"
        hints = list(dict.fromkeys(a.hint for a in attempts if a.hint))
        super().__init__(f"no source could be pulled from{of_total}: {tries}", hint="; ".join(hints))
        self.attempts = tuple(attempts)
        self.verified = verified
        self.total = total


SOON_OVER = frozenset({"not-ready", "busy", "gone"})
"""Codes of refusals that may be over soon."""


def next_step(error: NetloaderError, *, progressed: bool) -> Literal["again", "last", "later", "drop"]:
    """What an error of a session with a source means for that source.

    Args:
        error: Why the session ended.
        progressed: Whether it had brought blocks before.

    Returns:
        Whether the source is worth another try: ``again`` at once, ``last`` after all others, ``later`` after a pause
        (as long as one waits), or not at all (``drop``).
    """
    code = error.code if isinstance(error, RefusedError) else ""
    if code in SOON_OVER:
        return "later"
    if isinstance(error, TransferTimeout | TransportUnavailable):
        return "drop"
    # It is there, and gave us up as too slow: this process or its host may have stood still for a while.
    if code == "timeout":
        return "last" if progressed else "drop"
    # Where a channel broke, the other end's farewell may be heard before the channel itself is seen to be broken.
    if isinstance(error, TransportError) or code == "transport":
        return "again" if progressed else "later"
    return "drop"
