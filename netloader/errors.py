"""Every error that netloader raises.

All errors have one base class, :class:`NetloaderError`, so that a caller needs a single ``except``. Its subclasses are
grouped by what caused the error: the caller's configuration or tensors, the peer's behaviour, a peer's refusal, the
transport, or wrong contents. Each error has a ``hint``, one sentence that says what to do, and a ``story``, the last
state transitions of the failed session. Neither contains tensor data.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any, Literal, Protocol

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

TORCH_HINT = (
    "tensors need the extra `torch`: in netloader's folder, pip install '.[torch]'; pip keeps a torch that is there, "
    "and otherwise takes the build that your package index prefers, often one with CUDA: to choose, install torch first"
)
"""What to do if torch is missing."""

_SHOWN_PROBLEMS = 20
_SHOWN_NAMES = 3
_SHOWN_UNEXPECTED = 500
_SHOWN_REFUSAL = 2000
"""Most characters of what a peer gave as a reason or as advice."""


def legible(text: str, limit: int | None = None) -> str:
    r"""`text` as one line without characters that a terminal or a log obeys instead of showing them.

    Every error passes its texts through here, because much of what an error says may be text of a peer. The same
    function is applied to notes of a session and to each line that a command prints.

    Args:
        text: Any text.
        limit: Most characters of the result; None for no limit.

    Returns:
        The text with control characters, line breaks, escape sequences, direction marks and invisible characters
        written as escapes (``\n``, ``\x1b``, ``\u202e``), cut at `limit`.
    """
    if limit is not None and len(text) > limit:
        text = f"{text[: limit - 3]}..."
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
        if limit is not None and len(text) > limit:  # the escapes are longer than what they stand for
            text = f"{text[: limit - 3]}..."
    return text


def plural(count: int, noun: str, several: str = "") -> str:
    """``1 tensor``, ``2 tensors``. `several`: the plural, if it is not the noun with an s."""
    return f"{count} {noun if count == 1 else several or noun + 's'}"


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
        super().__init__(legible(message))
        self.hint = legible(hint)
        self.story: tuple[str, ...] = ()

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} ({self.hint})" if self.hint else message

    @property
    def message(self) -> str:
        """The text without the hint."""
        return super().__str__()

    def __reduce__(self) -> tuple[object, ...]:
        # The default would call the class with the message alone; most classes here take other arguments.
        return _restored, (type(self), self.args, self._state())

    def _state(self) -> dict[str, Any]:
        """The attributes, as another process may have them."""
        return dict(self.__dict__)


def _restored(kind: type[NetloaderError], arguments: tuple[object, ...], state: dict[str, Any]) -> NetloaderError:
    """An error as it was in the process that it comes from. Called when an error is copied or comes from a process."""
    error = kind.__new__(kind, *arguments)  # sets `args`, and `__init__` is not called
    error.__dict__.update(state)
    return error


def shown(value: object, limit: int = 200) -> str:
    """Return the ``repr`` of `value`, cut at `limit` characters, for use in a message.

    Where ``repr`` fails (an integer of thousands of digits, a very deeply nested list), the type is named instead.
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"<{type(value).__name__} too large to show>"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


_NO_THREAD = "can't start new thread"
_FEW_FILES = "raise the limit of open files (ulimit -n)"
_REMEDIES = {
    errno.EMFILE: _FEW_FILES,
    errno.ENFILE: _FEW_FILES,
    errno.ENOBUFS: "free memory on this host: there is none left for sockets",
    errno.ENOMEM: "free memory on this host, or raise the limit of the container",
    errno.EAGAIN: "raise the limit of threads and processes (ulimit -u, or pids.max of the container)",
}

_EXHAUSTED = _REMEDIES.keys() - {errno.EAGAIN}
"""Errors that mean a shortage in every call; EAGAIN does so only where a thread or process is started."""


def remedy_for(error: BaseException) -> str:
    """What to do about an error of the host: a limit was reached, or something is missing. Empty for other errors.

    Such an error may come up anywhere, and is no bug of this package.
    """
    if isinstance(error, MemoryError):
        return _REMEDIES[errno.ENOMEM]
    if isinstance(error, RuntimeError) and str(error).startswith(_NO_THREAD):
        return _REMEDIES[errno.EAGAIN]
    if not isinstance(error, OSError):
        return ""
    if isinstance(error, FileNotFoundError) and str(error.filename).startswith("/proc/"):
        return "mount /proc: it is missing here, or does not show all of this process"
    return _REMEDIES.get(error.errno or 0, "this host refused it: check the file, limit or address that it names")


def unexpected(error: Exception, where: str = "netloader") -> NetloaderError:
    """The error to report in place of one that no code expects. `where`: where the bug is, unless the host is at fault.

    The caller logs `error` itself, which is the cause of the result.
    """
    hint = remedy_for(error) or f"this is a bug in {where}: the log has the details"
    made = NetloaderError(f"unexpected {type(error).__name__}: {error}"[:_SHOWN_UNEXPECTED], hint=hint)
    made.__cause__ = error
    return made


def without_source(message: str, source: str) -> str:
    """`message` without the address at its start, for use behind that address."""
    return message.removeprefix(f"{source} ") if source else message


def _is_plain(value: object) -> bool:
    """Whether `value` consists of JSON's types and bytes."""
    if type(value) in (list, tuple):
        return all(_is_plain(item) for item in value)  # type: ignore[attr-defined]
    if type(value) is dict:
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return value is None or type(value) in (str, bytes, int, float, bool)


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

    def _state(self) -> dict[str, Any]:
        # The value may be anything that a caller passed. What is not plain data is replaced by its text.
        return {**super()._state(), "value": self.value if _is_plain(self.value) else shown(self.value)}


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
        super().__init__(legible(message, _SHOWN_REFUSAL), hint=legible(hint, _SHOWN_REFUSAL))
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

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "_threads": ()}  # threads of another process cannot be asked

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
        generation: Generation of the source, if it was found in a registry.
    """

    def __init__(self, source: str, cause: NetloaderError, times: int = 1, generation: str = "") -> None:
        super().__init__(f"{source}: {without_source(cause.message, source)}", hint=cause.hint)
        self.source = source
        self.cause = cause
        self.times = times
        self.generation = generation
        self.story = cause.story


class NoSourceLeft(NetloaderError):
    """A pull failed: no source could give all blocks.

    Args:
        attempts: The failed attempts, in order.
        verified: Bytes that were verified before the pull failed.
        total: Bytes of the whole pull, or None when no manifest was agreed on.
        advice: What to do besides the hints of the attempts.
    """

    def __init__(
        self,
        attempts: Sequence[AttemptFailed],
        *,
        verified: int = 0,
        total: int | None = None,
        advice: str = "",
    ) -> None:
        of_total = "" if total is None else f" ({verified} of {total} bytes were verified)"
        failures = (f"{a.message} ({a.times} times)" if a.times > 1 else a.message for a in attempts)
        tries = "; ".join(failures) or "no source was given"
        hints = list(dict.fromkeys(hint for hint in (*(a.hint for a in attempts), advice) if hint))
        super().__init__(f"no source could be pulled from{of_total}: {tries}", hint="; ".join(hints))
        self.attempts = tuple(attempts)
        self.verified = verified
        self.total = total


def shortage(error: BaseException) -> TransportError | None:
    """The error for a user, if `error` means that this process can't have more threads, files or memory; else None."""
    if isinstance(error, RuntimeError) and str(error).startswith(_NO_THREAD):
        return TransportError("this process can't start another thread", hint=remedy_for(error))
    if isinstance(error, OSError) and error.errno in _EXHAUSTED:
        return TransportError(f"this process has run out of resources: {error}", hint=remedy_for(error))
    return None


TRANSIENT_CODES = frozenset({"not-ready", "busy", "gone"})
"""Codes of refusals that may not be repeated when the client tries again later."""


def is_transient(error: NetloaderError) -> bool:
    """Whether a server refused with one of :data:`TRANSIENT_CODES`."""
    return isinstance(error, RefusedError) and error.code in TRANSIENT_CODES


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
