"""The examples of docs/transports.md run unchanged, in order, in a separate process."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.preloaded import PYTHON

PAGE = Path(__file__).parents[2] / "docs" / "transports.md"


def test_the_examples_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    done = subprocess.run(
        [PYTHON, "-W", "error", "-c", "\n".join(blocks)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
