"""The command line: serve a checkpoint, pull one, ask a source what it holds, watch two processes do it all."""

from __future__ import annotations

import gc
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from netloader.cli.arguments import make_parser
from netloader.cli.console import Exit, report_error, set_up_logging

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What follows the command's name; the process's own when None.

    Returns:
        The exit status; see :class:`netloader.cli.console.Exit`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whoever reads us through a pipe wants each line when it is written
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    options = make_parser().parse_args(arguments)
    set_up_logging(options.log_level)
    try:
        # Commands are imported when they are needed: most of them bring torch.
        with _without_collector():
            command = import_module(f"netloader.cli.{options.command}")
        return int(command.run(options))
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except Exception as error:  # noqa: BLE001 - whatever it is, a command ends with one line and a status
        return report_error(error, debug=options.debug)
    finally:
        if arguments is None:  # this process ends now; Python would look through all of torch once more (0.5 s)
            gc.freeze()


@contextmanager
def _without_collector() -> Iterator[None]:
    """No garbage is looked for: nothing that an import brings is any."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
