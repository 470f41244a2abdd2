"""The test file of docs/usage.md is what it says: a whole test file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"^### Testing your code with pytest-asyncio$.*?(?=^#)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
FILES = {"toml": "pyproject.toml", "python": "test_weights.py"}


@pytest.mark.parametrize("options", [[], ["--asyncio-debug"]], ids=["plain", "debug"])
def test_the_test_file_of_the_documentation_passes(tmp_path: Path, options: list[str]) -> None:
    section = SECTION.search((ROOT / "docs/usage.md").read_text(encoding="utf-8"))
    assert section is not None
    blocks = {found["language"]: found["text"] for found in BLOCK.finditer(section[0])}
    assert blocks.keys() == FILES.keys()
    for language, name in FILES.items():
        (tmp_path / name).write_text(blocks[language], encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=110, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
