"""What all commands share: how they end, how they log, how they show progress and errors."""

from __future__ import annotations

import enum
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from netloader.config.files import read_token
from netloader.core.report import ProgressCallback
from netloader.errors import (
    CheckpointError,
    ConfigError,
    ManifestError,
    NetloaderError,
    NoSourceLeft,
    RefusedError,
    TransportUnavailable,
    VerificationError,
)
from netloader.observe.progress import ProgressBar, ProgressLog

__all__ = [
    "Exit",
    "error_lines",
    "exit_for",
    "progress_shown",
    "report_error",
    "say",
    "set_up_logging",
    "token_from",
    "whole_error",
]

_CLEAR_LINE = "\r\x1b[K"


class Exit(enum.IntEnum):
    """How a command ends, as its exit status."""

    OK = 0
    FAILED = 1
    """No source could be pulled from, or something else went wrong on the way."""
    USAGE = 2
    """An argument, a file or this installation is not what the command needs; nothing was sent."""
    UNVERIFIED = 3
    """What arrived, or what a source holds, is not what it should be."""
    INTERRUPTED = 130
    """The user pressed Ctrl-C."""


def exit_for(error: BaseException) -> Exit:
    """The exit status that tells of `error`."""
    causes = [attempt.cause for attempt in error.attempts] if isinstance(error, NoSourceLeft) else [error]
    if any(_is_unverified(cause) for cause in causes):
        return Exit.UNVERIFIED
    # Of several sources only the last word counts: a wrong address beside one that is down is no wrong usage.
    if isinstance(error, CheckpointError) and isinstance(error.__cause__, OSError):
        return Exit.FAILED  # a full disk, say
    if isinstance(error, CheckpointError | ConfigError | ManifestError | TransportUnavailable | ImportError):
        return Exit.USAGE
    return Exit.FAILED


def _is_unverified(error: BaseException) -> bool:
    # Whichever side first sees that the roots differ says so: a server does it by refusing.
    return isinstance(error, VerificationError) or (isinstance(error, RefusedError) and error.code == "root")


def whole_error(error: BaseException) -> BaseException:
    """The error itself, where a task group wrapped a single one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def report_error(error: BaseException, *, debug: bool) -> Exit:
    """Print one line about `error`, and a hint where there is one.

    Args:
        error: What ended the command.
        debug: Print where it happened as well.

    Returns:
        How the command ends.
    """
    error = whole_error(error)
    message, hint = error_lines(error)
    if debug:
        logging.getLogger("netloader").error("the command failed", exc_info=error)
        if isinstance(error, NetloaderError):
            for move in error.story:
                say(f"  {move}", to_stderr=True)
    say(f"netloader: error: {message}", to_stderr=True)
    if hint:
        say(f"netloader: hint: {hint}", to_stderr=True)
    return exit_for(error)


def error_lines(error: BaseException) -> tuple[str, str]:
    """What was wrong and what to do, a line each; the latter may be empty."""
    if isinstance(error, NetloaderError):
        message, hint = error.message, error.hint
    elif isinstance(error, ImportError):
        message, hint = str(error), "tensors need the extra `torch`: pip install 'netloader[torch]'"
    elif isinstance(error, OSError):
        message, hint = str(error), ""
    else:
        message, hint = f"{type(error).__name__}: {error}", "this is a fault of netloader; --debug shows where"
    return " ".join(message.split()), " ".join(hint.split())


def say(text: str, *, to_stderr: bool = False) -> None:
    """Print a line; results go to standard output, news about the way there to standard error."""
    try:
        print(text, file=sys.stderr if to_stderr else sys.stdout, flush=True)
    except BrokenPipeError:
        sys.stdout = sys.stderr  # whoever read us has seen enough; what we do goes on


def set_up_logging(level: str) -> None:
    """Send netloader's log to standard error, one line per record."""
    clear = _CLEAR_LINE if sys.stderr.isatty() else ""  # a record may come while a bar stands in the last line
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{clear}%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("netloader")
    log.handlers[:] = [handler]
    log.setLevel(level.upper())
    log.propagate = False


@contextmanager
def progress_shown(every: float, verb: str) -> Iterator[ProgressCallback]:
    """Show progress on standard error: a bar on a terminal, otherwise a line every few seconds."""
    if sys.stderr.isatty():
        with ProgressBar(sys.stderr) as bar:
            yield bar
    else:
        yield ProgressLog(partial(say, to_stderr=True), every=every, verb=verb)


def token_from(path: str | None) -> bytes | None:
    """The shared secret in a file, or None without one.

    Raises:
        ConfigError: The file can't be read, or its contents are no secret.
    """
    if path is None:
        return None
    warnings: list[str] = []
    token = read_token(path, warnings)
    for warning in warnings:
        logging.getLogger("netloader").warning(warning)
    return token.reveal()
