"""``netloader transports``: lists the transports that can run on this machine."""

from __future__ import annotations

import argparse

from netloader.cli.console import Exit, say
from netloader.errors import TransportUnavailable
from netloader.transports import registry

__all__ = ["run"]


def run(_: argparse.Namespace) -> Exit:
    """Print one line for each registered transport, and the names that `auto` stands for."""
    auto = registry.preferred("cpu")
    runs = []
    for name in registry.known():
        try:
            reason = registry.load(name).missing("cpu")
        except TransportUnavailable as error:
            reason = str(error)
        if reason is None:
            runs.append(name)
            say(f"{name}: runs here{'' if name in auto else ', when it is asked for by name'}")
        else:
            say(f"{name}: does not run here: {reason}")
    say(f"auto: {', '.join(name for name in auto if name in runs) or 'nothing'}")
    return Exit.OK
