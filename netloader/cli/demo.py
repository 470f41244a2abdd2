"""``netloader demo``: the arguments of :func:`netloader.cli.demo_run.run_demo`."""

from __future__ import annotations

import argparse

import anyio

from netloader.cli.console import say
from netloader.cli.demo_run import run_demo
from netloader.transports.faults import Fault

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """Run both processes; the client's exit status is ours."""
    if options.fault is not None:
        Fault.parse(options.fault)  # refuse an invalid fault before any file is created
    return anyio.run(run_demo, options.bytes, options.transport, options.fault, options.keep, say)
