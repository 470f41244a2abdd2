"""What all commands share: exit status, logging, progress and error messages."""

from __future__ import annotations

import enum
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import msgspec

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
    legible,
)
from netloader.observe.progress import ProgressBar, ProgressLog

__all__ = [
    "Exit",
    "error_lines",
    "exit_for",
    "progress_shown",
    "report_error",
    "say",
    "say_json",
    "set_up_logging",
    "token_from",
    "whole_error",
]

_CLEAR_LINE = "\r\x1b[K"


class Exit(enum.IntEnum):
    """The exit status of a command."""

    OK = 0
    FAILED = 1
    """No source could be pulled from, or another error occurred."""
    USAGE = 2
    """An argument, a file or the installation is not what the command needs. Nothing was sent."""
    UNVERIFIED = 3
    """What arrived, or what a source holds, is not what was expected."""
    INTERRUPTED = 130
    """The user pressed Ctrl-C."""


def exit_for(error: BaseException) -> Exit:
    """The exit status for `error`."""
    causes = [attempt.cause for attempt in error.attempts] if isinstance(error, NoSourceLeft) else [error]
    if any(_is_unverified(cause) for cause in causes):
        return Exit.UNVERIFIED
    # A usage error at one of several sources is not a usage error of the command, because others may only be down.
    if isinstance(error, CheckpointError) and isinstance(error.__cause__, OSError):
        return Exit.FAILED  # for example a full disk
    if isinstance(error, CheckpointError | ConfigError | ManifestError | TransportUnavailable | ImportError):
        return Exit.USAGE
    return Exit.FAILED


def _is_unverified(error: BaseException) -> bool:
    # Either side may find that the roots differ: a server then refuses.
    return isinstance(error, VerificationError) or (isinstance(error, RefusedError) and error.code == "root")


def whole_error(error: BaseException) -> BaseException:
    """The error itself, if a task group wrapped a single one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def report_error(error: BaseException, *, debug: bool) -> Exit:
    """Print one line about `error`, and a hint where there is one.

    Args:
        error: The error that ended the command.
        debug: Print the traceback and the last transitions too.

    Returns:
        The exit status.
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
    """The message and the hint, one line each. The hint may be empty."""
    if isinstance(error, NetloaderError):
        message, hint = error.message, error.hint
    elif isinstance(error, ImportError):
        message, hint = str(error), "tensors need the extra `torch`: pip install 'netloader[torch]'"
    elif isinstance(error, OSError):
        message, hint = str(error), ""
    else:
        message, hint = f"{type(error).__name__}: {error}", "this is a bug in netloader; --debug shows where"
    return " ".join(message.split()), " ".join(hint.split())


def say(text: str, *, to_stderr: bool = False) -> None:
    """Print a line: results to standard output, messages about progress to standard error.

    What a terminal would obey instead of showing it is escaped, because the line may hold text of a peer.
    """
    try:
        print(legible(text), file=sys.stderr if to_stderr else sys.stdout, flush=True)
    except BrokenPipeError:
        sys.stdout = sys.stderr  # the reader closed the pipe; the command continues


def say_json(data: object) -> None:
    """Print `data` as one line of JSON. Characters outside of ASCII are escaped, as in :func:`say`."""
    say(json.dumps(msgspec.to_builtins(data)))


def set_up_logging(level: str) -> None:
    """Send netloader's log to standard error, one line per record."""
    clear = _CLEAR_LINE if sys.stderr.isatty() else ""  # the last line may hold a progress bar
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
        ConfigError: The file can't be read, or its contents are not a valid secret.
    """
    if path is None:
        return None
    warnings: list[str] = []
    token = read_token(path, warnings)
    for warning in warnings:
        logging.getLogger("netloader").warning(warning)
    return token.reveal()
