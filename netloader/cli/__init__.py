"""The command line: serve a checkpoint, pull one, probe a source, list transports, check a configuration, a demo."""

from __future__ import annotations

import gc
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from netloader.cli.arguments import make_parser
from netloader.cli.console import Exit, have_streams, report_error, say, set_up_logging

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The arguments after the command's name; those of the process when None.

    Returns:
        The exit status; see :class:`netloader.cli.console.Exit`.
    """
    have_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a reader at the other end of a pipe needs each line at once
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    options = make_parser().parse_args(arguments)
    set_up_logging(options)
    try:
        # Commands are imported on demand, because most of them import torch.
        with _without_collector():
            command = import_module(f"netloader.cli.{options.command}")
        return int(command.run(options))
    except KeyboardInterrupt:
        say("netloader: interrupted", to_stderr=True)
        return Exit.INTERRUPTED
    except Exception as error:  # noqa: BLE001 - a command always ends with one line and a status
        return report_error(error, options)
    finally:
        if arguments is None:  # the process ends now; skip Python's final garbage collection, which takes 0.5 s
            gc.freeze()


@contextmanager
def _without_collector() -> Iterator[None]:
    """Disable garbage collection during imports, which create no garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
