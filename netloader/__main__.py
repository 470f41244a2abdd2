"""Runs the command ``netloader`` as ``python -m netloader``."""

from __future__ import annotations

import sys

from netloader.cli import main

if __name__ == "__main__":
    sys.exit(main())
