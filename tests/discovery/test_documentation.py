"""The scheme of docs/discovery.md, installed as the page says: a module, and an entry point."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

from tests.preloaded import PYTHON

PAGE = (Path(__file__).parents[2] / "docs" / "discovery.md").read_text(encoding="utf-8")
SECTION = PAGE.split("\n## A scheme of one's own\n")[1].split("\n## ")[0]


def test_the_scheme_of_ones_own_is_found(tmp_path: Path) -> None:
    (module,) = re.findall(r"^```python\n(.*?)^```", SECTION, re.DOTALL | re.MULTILINE)
    (metadata,) = re.findall(r"^```toml\n(.*?)^```", SECTION, re.DOTALL | re.MULTILINE)
    ((group, names),) = tomllib.loads(metadata)["project"]["entry-points"].items()
    first = "import anyio\nfrom collections.abc import AsyncGenerator\n"
    (tmp_path / "sqlite_registry.py").write_text(first + module)
    installed = tmp_path / "sqlite_registry-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: sqlite-registry\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in names.items())
    (installed / "entry_points.txt").write_text(f"[{group}]\n{lines}")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from netloader.discovery import registry\n"
        "from netloader.errors import ConfigError\n"
        f"print(type(registry.open_backend('sqlite:{tmp_path}/names.db')).__name__, 'sqlite' in registry.known())\n"
        "try: registry.open_backend('sqlite:', field='DISCOVERY')\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run([PYTHON, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found, wrong = done.stdout.splitlines()
    assert found == "LeaseBackend True"
    assert wrong.startswith("DISCOVERY = 'sqlite:' is not valid")
