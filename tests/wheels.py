"""Released packages that tests read and never install: downloaded once, into `NETLOADER_WHEELS` or the user's cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

UNREACHABLE = ("connection", "temporary failure", "timed out", "max retries", "no such host", "network", "proxy")

_BACKEND = """
import os
def prepare_metadata_for_build_wheel(directory, settings=None):
    folder = os.path.join(directory, "{name}-{release}.dist-info")
    os.mkdir(folder)
    with open(os.path.join(folder, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: {name}\\nVersion: {release}\\n")
    return os.path.basename(folder)
"""
"""A build backend that only states what the package is called. pip asks one before it keeps a source archive, and the
package's own would install what it is built with first: for vLLM, torch and CMake."""


def cache() -> Path:
    """The folder of the downloads."""
    named = os.environ.get("NETLOADER_WHEELS")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "netloader-wheels"


def wheel_of(package: str, release: str, *options: str) -> Path:
    """The wheel of a release; the test is skipped where no package index can be reached."""
    pattern = f"{package.replace('-', '_')}-{release}-*.whl"
    folder = cache()
    found = next(iter(folder.glob(pattern)), None)
    if found is None:
        _download(package, release, folder, "--only-binary=:all:", *options)
        found = next(iter(folder.glob(pattern)))
    return found


def sources_of(package: str, release: str) -> Path:
    """A zip file with the Python files of a release, as in its wheel; skipped where no package index can be reached.

    They are taken from the source archive, whose build backend is setuptools. It has no compiled code: 47 MB where the
    wheel of vLLM 0.33.0 has 336 MB. The zip file has 11 MB.
    """
    found = cache() / f"{package}-{release}-sources.zip"
    if not found.exists():
        with tempfile.TemporaryDirectory() as scratch:
            backend = Path(scratch, "backend", "setuptools")
            backend.mkdir(parents=True)
            (backend / "__init__.py").touch()
            (backend / "build_meta.py").write_text(_BACKEND.format(name=package, release=release))
            more = {"PYTHONPATH": str(backend.parent)}
            _download(package, release, Path(scratch), "--no-binary=:all:", "--no-build-isolation", more=more)
            _repack(package, Path(scratch, f"{package}-{release}.tar.gz"), found)
    return found


def _download(package: str, release: str, folder: Path, *options: str, more: Mapping[str, str] | None = None) -> None:
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries=1", *options]
    done = subprocess.run(
        [*fetch, f"--dest={folder}", f"{package}=={release}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **(more or {})},
    )
    if done.returncode != 0:
        # An unreachable index skips the test; a missing release fails it.
        said = done.stderr.lower()
        if any(word in said for word in UNREACHABLE) and "no matching distribution" not in said:
            pytest.skip(f"NOT CHECKED: the package index cannot be reached for {package} {release}")
        pytest.fail(f"{package} {release} cannot be fetched: {done.stderr}")


def _repack(package: str, archive: Path, into: Path) -> None:
    """Write a package of a source archive to a zip file, whole or not at all, because several processes run tests."""
    into.parent.mkdir(parents=True, exist_ok=True)
    written = into.with_name(f"{into.name}.{os.getpid()}")
    with tarfile.open(archive) as files, zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as kept:
        for member in files:
            _, _, path = member.name.partition("/")
            content = files.extractfile(member) if path.startswith(f"{package}/") and path.endswith(".py") else None
            if content is not None:
                kept.writestr(path, content.read())
    written.replace(into)
