"""Every error that netloader raises.

All errors have one base class, :class:`NetloaderError`, so that a caller needs a single ``except``. Its subclasses are
grouped by what caused the error: the caller's configuration or tensors, the peer's behaviour, a peer's refusal, the
transport, or wrong contents. Each error has a ``hint``, one sentence that says what to do, and a ``story``, the last
state transitions of the failed session. Neither contains tensor data.
"""

from __future__ import annotations

import errno
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
        hint: The hint as given; empty when there is no useful advice.
        story: The last state transitions of the session concerned, oldest first.
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
    """Return the ``repr`` of `value`, cut at `limit` characters, for use in a message.

    Where ``repr`` fails (an integer of thousands of digits, a very deeply nested list), the type is named instead.
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
        allowed: Which values are accepted.
        reason: What exactly is wrong, when `allowed` alone does not say it.
        hint: What to do; by default none.
    """

    def __init__(self, *, field: str, value: object, allowed: str, reason: str | None = None, hint: str = "") -> None:
        why = f": {reason}" if reason else ""
        super().__init__(f"{field} = {shown(value)} is not valid{why}; allowed: {allowed}", hint=hint)
        self.field = field
        self.value = value
        self.allowed = allowed
        self.reason = reason


class ManifestError(NetloaderError):
    """Tensors can't be described in a manifest, or two manifests do not describe the same tensors.

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
    """A message or call violated the protocol of the control connection."""


class LocalProtocolError(ProtocolError):
    """This side did something that is not legal in the session's state: a bug in the caller."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something that is malformed, too large, or not legal in the session's state."""


class RefusedError(NetloaderError):
    """The peer refused, and gave a reason.

    Args:
        code: Which kind of refusal (see :class:`netloader.core.messages.RefusalCode`).
        message: The peer's reason.
        hint: The peer's advice.
        retry_after: Seconds after which the peer suggests another attempt, or None when another attempt is useless.
        sources: Addresses from which the peer says that the weights can be pulled instead.
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
    """The peer is gone: its process ended, or the connection broke. Raised for control and data connections."""


class TransferTimeout(TransportError):
    """A wait passed its deadline."""


class ChannelClosed(TransportError):
    """The channel was closed on this side."""


class ChannelBusy(TransportError):
    """More operations were started on one direction of a channel than it allows at a time: a bug in the caller."""


class _Thread(Protocol):
    """The part of ``threading.Thread`` that is used here."""

    @property
    def name(self) -> str: ...

    def is_alive(self) -> bool: ...


class MemoryStillInUse(TransportError):
    """A transport may still use memory that it was given: a thread that was told to return did not.

    After a receive, the thread may write into the memory at any later time. Such a pull has failed for good: no other
    source and no other loader may fill the same memory, and the process has to end. After a send, the thread only
    reads.

    Args:
        what: The channel.
        threads: The threads that did not return; empty when it is a library's operation, and no thread of ours.
        writes: Whether the memory may still be written.
        seconds: How long the threads were waited for.

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
        """Whether the memory may still be in use: some of the threads are alive, or none are known."""
        return not self._threads or any(thread.is_alive() for thread in self._threads)


class TransportUnavailable(TransportError):
    """No transport that both sides have can run here, or a requested one is unknown or not installed."""


class VerificationError(NetloaderError):
    """What arrived is not what the server announced."""


class DigestMismatch(VerificationError):
    """A block's bytes do not have the digest that the server announced.

    Args:
        block: Number of the block.
        tensors: Names of the tensors whose bytes it holds.
        expected: The announced digest, in hex.
        actual: The digest of the bytes in memory, in hex.
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
    """A source holds other weights than those that this pull is pinned to.

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
    """An attempt at one source failed; an entry in the report of a pull.

    Args:
        source: The address.
        cause: Why it failed.
        times: How many attempts at this source failed in this way; `cause` is the last error.
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
        attempts: The failed attempts, in order.
        verified: Bytes that were verified before the pull failed.
        total: Bytes of the whole pull, or None when no manifest was agreed on.
    """

    def __init__(self, attempts: Sequence[AttemptFailed], *, verified: int = 0, total: int | None = None) -> None:
        of_total = "" if total is None else f" ({verified} of {total} bytes were verified)"
        failures = (f"{a.message} ({a.times} times)" if a.times > 1 else a.message for a in attempts)
        tries = "; ".join(failures) or "no source was given"
        hints = list(dict.fromkeys(a.hint for a in attempts if a.hint))
        super().__init__(f"no source could be pulled from{of_total}: {tries}", hint="; ".join(hints))
        self.attempts = tuple(attempts)
        self.verified = verified
        self.total = total


_EXHAUSTED = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files of this host (fs.file-max)",
    errno.ENOBUFS: "this host has no memory left for sockets",
    errno.ENOMEM: "this host has no memory left",
}
"""Errors of the system that mean that a process or its host has run out of something -> what to do."""


def shortage(error: BaseException) -> TransportError | None:
    """The error for a user, if `error` means that this process can't have more threads, files or memory; else None."""
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        hint = "raise the limit of threads and processes (ulimit -u, or the pids limit of the container)"
        return TransportError("this process can't start another thread", hint=hint)
    if isinstance(error, OSError) and error.errno in _EXHAUSTED:
        return TransportError(f"this process has run out of resources: {error}", hint=_EXHAUSTED[error.errno])
    return None


TRANSIENT_CODES = frozenset({"not-ready", "busy", "gone"})
"""Codes of refusals that may not be repeated when the client tries again later."""


def next_step(error: NetloaderError, *, progressed: bool) -> Literal["again", "last", "later", "drop"]:
    """Decide whether to try a source again after its session failed.

    Args:
        error: Why the session ended.
        progressed: Whether the session delivered blocks before.

    Returns:
        ``again``: try again at once. ``last``: try again after all other sources. ``later``: try again after a pause,
        until the pull stops waiting. ``drop``: don't try again.
    """
    code = error.code if isinstance(error, RefusedError) else ""
    if code in TRANSIENT_CODES:
        return "later"
    if isinstance(error, TransferTimeout | TransportUnavailable):
        return "drop"
    # The source is up, and ended the session because this side was too slow. It may have been suspended for a while.
    if code == "timeout":
        return "last" if progressed else "drop"
    # When a channel breaks, the peer's Goodbye may arrive before this side notices the broken channel.
    if isinstance(error, TransportError) or code == "transport":
        return "again" if progressed else "later"
    return "drop"
