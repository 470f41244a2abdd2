"""The README says how to install what its Python example needs, and an error without it says the same.

That the example itself runs is shown by `tests/test_docs.py`; what the bare wheel says by `tests/test_package.py`.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

from netloader.errors import TORCH_HINT
from tests.preloaded import PYTHON

ROOT = Path(__file__).parents[3]
INSTALL = "pip install '.[torch]'"


def section() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.partition("## Use it from Python\n")[2].partition("\n## ")[0]


def test_the_install_line_stands_before_the_example() -> None:
    commands = re.findall(r"```shell\n(.*?)```", section(), re.DOTALL)
    assert commands == [f"{INSTALL}\n"]
    assert section().index(INSTALL) < section().index("```python")


def test_the_extra_has_what_the_example_imports() -> None:
    extra = {
        requirement.name
        for requirement in map(Requirement, importlib.metadata.requires("netloader") or [])
        if requirement.marker is not None and requirement.marker.evaluate({"extra": "torch"})
    }
    example = re.findall(r"^import (\w+)", section(), re.MULTILINE)
    assert set(example) - {"netloader"} <= extra


def test_beside_an_installed_torch_nothing_else_is_fetched() -> None:
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-build-isolation"]
    pip += ["--dry-run", "--report", "-", ".[torch]"]
    done = subprocess.run([sys.executable, *pip], check=False, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout[done.stdout.index("{") :])["install"]
    assert {one["metadata"]["name"] for one in planned} <= {"netloader"}


def test_an_error_without_torch_names_the_extra() -> None:
    program = """\
import sys, traceback
sys.modules["torch"] = None
import netloader
try:
    netloader.sync.pull({}, sources=["127.0.0.1:1"])
except ModuleNotFoundError:
    traceback.print_exc()
"""
    done = subprocess.run([PYTHON, "-c", program], check=True, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert f"netloader: {TORCH_HINT}" in done.stderr
    assert INSTALL in TORCH_HINT
