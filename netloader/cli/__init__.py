"""The command line: serve a checkpoint, pull one, ask a source what it holds, watch two processes do it all."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
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
        return int(import_module(f"netloader.cli.{options.command}").run(options))
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except Exception as error:  # noqa: BLE001 - whatever it is, a command ends with one line and a status
        return report_error(error, debug=options.debug)
