"""Released wheels that tests read and never install: downloaded once, into `NETLOADER_WHEELS` or the user's cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

UNREACHABLE = ("connection", "temporary failure", "timed out", "max retries", "no such host", "network", "proxy")


def cache() -> Path:
    """The folder of the wheels."""
    named = os.environ.get("NETLOADER_WHEELS")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "netloader-wheels"


def wheel_of(package: str, release: str, *options: str) -> Path:
    """The wheel of a release; the test is skipped where no package index can be reached."""
    pattern = f"{package.replace('-', '_')}-{release}-*.whl"
    folder = cache()
    found = next(iter(folder.glob(pattern)), None)
    if found is None:
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1"]
        where = [*options, f"--dest={folder}", f"{package}=={release}"]
        done = subprocess.run([*fetch, *where], check=False, capture_output=True, text=True, timeout=100)
        if done.returncode != 0:
            # An unreachable index skips the test; a missing release fails it.
            said = done.stderr.lower()
            if any(word in said for word in UNREACHABLE) and "no matching distribution" not in said:
                pytest.skip(f"NOT CHECKED: the package index cannot be reached for {package} {release}")
            pytest.fail(f"{package} {release} cannot be fetched: {done.stderr}")
        found = next(iter(folder.glob(pattern)))
    return found
