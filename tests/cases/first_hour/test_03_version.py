"""`netloader.__version__` is the version of the installed package, and there is one without metadata too."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

import netloader
from netloader import api
from netloader.core import version

ROOT = Path(__file__).parents[3]


def test_it_is_that_of_the_metadata_and_of_the_project() -> None:
    assert netloader.__version__ == importlib.metadata.version("netloader")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert netloader.__version__ == project["version"]
    assert api.software() == f"netloader {netloader.__version__}"


def test_a_tree_without_metadata_has_one(tmp_path: Path) -> None:
    (tmp_path / "netloader").symlink_to(ROOT / "netloader")
    program = "import netloader, sys; sys.exit(print(netloader.__version__))"
    command = [sys.executable, "-S", "-P", "-c", program]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(tmp_path)}
    )
    assert done.stdout.strip() == version.UNKNOWN
    assert Version(version.UNKNOWN) < Version("0.1.0")


def test_peers_are_told_one_without_metadata_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(version, "version", missing)
    version.own_version.cache_clear()
    try:
        assert api.software() == f"netloader {version.UNKNOWN}"
    finally:
        version.own_version.cache_clear()
