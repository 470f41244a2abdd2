"""What all commands share: exit status, logging, progress and error messages."""

from __future__ import annotations

import argparse
import enum
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType

import msgspec

from netloader.cli.signals import Stop
from netloader.config import ConfigErrors
from netloader.config.files import read_token
from netloader.core.report import Progress, ProgressCallback
from netloader.core.texts import findable
from netloader.errors import (
    TORCH_HINT,
    AttemptFailed,
    CheckpointError,
    ConfigError,
    DigestMismatch,
    ManifestError,
    NetloaderError,
    NoSourceLeft,
    RefusedError,
    TransportUnavailable,
    VerificationError,
    legible,
    remedy_for,
)
from netloader.observe.progress import ProgressBar, ProgressLog

__all__ = [
    "Exit",
    "Interrupted",
    "error_as_data",
    "error_lines",
    "exit_for",
    "have_streams",
    "in_words_of",
    "print_json",
    "progress_shown",
    "report_error",
    "say",
    "set_up_logging",
    "token_from",
    "watched",
    "whole_error",
]

_CLEAR_LINE = "\r\x1b[K"
_STREAMS = 3

_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "LISTEN_PORT": "port",
        "LISTEN_HOST": "host",
        "MODEL": "model",
        "TIMEOUT": "timeout",
        "STALL_TIMEOUT": "stall_timeout",
        "WAIT": "wait",
        "TOKEN_FILE": "token_file",
        "EXPECT_ROOT": "expect_root",
        "TRANSPORT": "transport",
        "MAX_CLIENTS": "max_clients",
    }
)
"""The option of the command line for each field of the configuration that has one."""

_FIELD = re.compile(rf"\b(?:{'|'.join(_OPTIONS)})\b")


class Interrupted(Exception):
    """A signal ended the command, which has cleaned up.

    Args:
        number: The signal.
        result: What is left of the command's work, as a sentence.
    """

    def __init__(self, number: int, result: str) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}: {result}")
        self.number = number


class Exit(enum.IntEnum):
    """The exit status of a command. A command that a signal ended has 128 plus the number of the signal."""

    OK = 0
    FAILED = 1
    """No source could be pulled from, or another error occurred."""
    USAGE = 2
    """An argument, a file or the installation is not what the command needs. Nothing was sent."""
    UNVERIFIED = 3
    """What arrived, or what a source holds, is not what was expected."""
    INTERRUPTED = 130
    """The user pressed Ctrl-C."""


def exit_for(error: BaseException) -> int:
    """The exit status for `error`."""
    if isinstance(error, Interrupted):
        return 128 + error.number
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


def report_error(error: BaseException, options: argparse.Namespace) -> int:
    """Print one line about `error`, and a hint where there is one; with ``--json`` one object on standard output too.

    Args:
        error: The error that ended the command.
        options: The command's options. With ``--debug``, the traceback and the last transitions are printed too.

    Returns:
        The exit status, which the JSON object has too.
    """
    error = whole_error(error)
    status = int(exit_for(error))
    if getattr(options, "json", False):
        print_json({"ok": False, "exit": status, **error_as_data(error, options)})
    if options.debug:
        logging.getLogger("netloader").error("the command failed", exc_info=error)
        if isinstance(error, NetloaderError):
            for move in error.story:
                say(f"  {move}", to_stderr=True)
    for one in error.problems if isinstance(error, ConfigErrors) else (error,):
        message, hint = error_lines(one, options)
        say(f"netloader: error: {message}", to_stderr=True)
        if hint:
            say(f"netloader: hint: {hint}", to_stderr=True)
    return status


def error_lines(error: BaseException, options: argparse.Namespace) -> tuple[str, str]:
    """The message and the hint, one line each, in the words of the command line. The hint may be empty."""
    if isinstance(error, NetloaderError):
        message, hint = error.message, error.hint
    elif isinstance(error, ImportError):
        message, hint = str(error), TORCH_HINT
    elif isinstance(error, MemoryError):
        message, hint = f"no memory is left: {error}", remedy_for(error)
    elif isinstance(error, OSError | Interrupted):
        message, hint = str(error), ""
    else:
        message = f"{type(error).__name__}: {error}"
        hint = remedy_for(error) or "this is a bug in netloader; --debug shows where"
    return in_words_of(options, " ".join(message.split())), in_words_of(options, " ".join(hint.split()))


def in_words_of(options: argparse.Namespace, text: str) -> str:
    """`text` with the options of the command in place of the fields of the configuration: ``--port``, not LISTEN_PORT.

    A field that the command has no option for stays as it is.
    """

    def option(found: re.Match[str]) -> str:
        name = _OPTIONS[found[0]]
        return f"--{name.replace('_', '-')}" if name in vars(options) else found[0]

    return _FIELD.sub(option, text)


def error_as_data(error: BaseException, options: argparse.Namespace) -> dict[str, object]:
    """What is known about `error`, for JSON."""
    message, hint = error_lines(error, options)
    data: dict[str, object] = {"error": type(error).__name__, "message": message, "hint": hint}
    if isinstance(error, DigestMismatch):
        data |= {"block": error.block, "tensors": error.tensors, "announced": error.expected, "arrived": error.actual}
    if isinstance(error, ConfigErrors):
        data["faults"] = [_fault(fault, options) for fault in error.problems]
    if isinstance(error, NoSourceLeft):
        data["verified"], data["total"] = error.verified, error.total
        data["attempts"] = [_attempt(attempt, options) for attempt in error.attempts]
    return data


def _fault(fault: ConfigError, options: argparse.Namespace) -> dict[str, object]:
    message, hint = error_lines(fault, options)
    return {"field": fault.field, "message": message, "hint": hint}


def _attempt(attempt: AttemptFailed, options: argparse.Namespace) -> dict[str, object]:
    return {"source": attempt.source, **error_as_data(attempt.cause, options)}


def print_json(data: Mapping[str, object]) -> None:
    """Print one object on standard output. Characters outside of ASCII are escaped, as in :func:`say`."""
    say(json.dumps(msgspec.to_builtins(data)))


def have_streams() -> None:
    """Make sure that standard input, output and error exist.

    A process may be started without them (``2>&-``). Then the next file or socket that it opens would get their
    number, and whatever a library prints would go there.
    """
    opened = os.open(os.devnull, os.O_RDWR)
    while opened < _STREAMS:
        opened = os.open(os.devnull, os.O_RDWR)
    os.close(opened)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - open until the process ends
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def say(text: str, *, to_stderr: bool = False) -> None:
    """Print a line: results to standard output; to standard error what is found in a log by one word.

    What a terminal would obey instead of showing it is escaped, because the line may hold text of a peer.
    """
    try:
        print(legible(findable(text) if to_stderr else text), file=sys.stderr if to_stderr else sys.stdout, flush=True)
    except BrokenPipeError:
        sys.stdout = sys.stderr  # the reader closed the pipe; the command continues


class _Formatter(logging.Formatter):
    """Formats records in the words of the command line."""

    def __init__(self, form: str, options: argparse.Namespace) -> None:
        super().__init__(form, "%H:%M:%S")
        self._options = options

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return in_words_of(self._options, super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name in `logging`
        """Its line."""
        record.message = findable(record.message)
        return super().formatMessage(record)


def set_up_logging(options: argparse.Namespace) -> None:
    """Send netloader's log to standard error, one line per record."""
    clear = _CLEAR_LINE if sys.stderr.isatty() else ""  # the last line may hold a progress bar
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(f"{clear}%(asctime)s %(levelname)s %(message)s", options))
    log = logging.getLogger("netloader")
    log.handlers[:] = [handler]
    log.setLevel(options.log_level.upper())
    log.propagate = False


@contextmanager
def progress_shown(every: float, verb: str, *, last: bool = True) -> Iterator[ProgressCallback]:
    """Show progress on standard error: a bar on a terminal, otherwise a line every few seconds.

    `last`: whether to print a line at the end. A summary that follows makes it unneeded.
    """
    if sys.stderr.isatty():
        with ProgressBar(sys.stderr) as bar:
            yield bar
    else:
        yield ProgressLog(partial(say, to_stderr=True), every=every, verb=verb, last=last)


def watched(shown: ProgressCallback, what: str, stop: Stop) -> Callable[[int, int], None]:
    """A callback for work on files in a thread: it shows the bytes that are done, from now on, or stops the work.

    Raises (when called):
        Stopped: The command was told to stop.
    """
    began = time.monotonic()

    def done(nbytes: int, total: int) -> None:
        stop.check()
        shown(Progress(nbytes, total, time.monotonic() - began, what))

    return done


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
