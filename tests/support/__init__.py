"""Helpers for tests of several rooms."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

PLUGINS = Path(__file__).parent / "plugins"
"""On PYTHONPATH: the transport `held`, through its entry point."""


def with_plugins(environment: Mapping[str, str], **more: str) -> dict[str, str]:
    """An environment for a process that uses the test transports.

    Args:
        environment: The base environment.
        more: Variables to add (NETLOADER_TEST_HOLD and so on).
    """
    paths = [str(PLUGINS), environment.get("PYTHONPATH", "")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}
