"""The documentation: examples run, JSON parses, shell is well-formed, links have a target.

Python blocks of a page run in order and share their names, like an interactive session. Shell blocks run when they
begin with ``netloader``; the others need vLLM, or change the machine, and are only parsed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from netloader.config import load_config
from tests.preloaded import PYTHON

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
RUN_ELSEWHERE = {"docs/transports.md": "tests/transports/test_documentation.py"}
KNOWN = {"python", "shell", "json", "toml", "text", "mermaid"}
EXAMPLE_PORT = "19374"

FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")

RUNNER = """\
import json, sys
names = {"__name__": "__main__"}
for place, text in json.load(sys.stdin):
    exec(compile("\\n" * place + text, sys.argv[1], "exec"), names)
"""


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [
        Block(name_of(path), text[: found.start()].count("\n") + 1, (found["info"].split() or [""])[0], found["text"])
        for found in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def headings(path: Path) -> set[str]:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_there_is_documentation() -> None:
    assert {"README.md", "docs/usage.md", "docs/vllm.md", "docs/configuration.md"} <= {name_of(page) for page in PAGES}
    assert len(of("python")) >= 6


def test_code_blocks_name_their_language() -> None:
    assert [str(block) for block in BLOCKS if block.language not in KNOWN] == []


@pytest.mark.parametrize("page", sorted({b.page for b in of("python")} - set(RUN_ELSEWHERE)))
def test_python_examples_run(page: str, tmp_path: Path) -> None:
    blocks = [(block.line, block.text) for block in of("python") if block.page == page]
    done = subprocess.run(
        [PYTHON, "-c", RUNNER, page],
        input=json.dumps(blocks),
        check=False,
        capture_output=True,
        text=True,
        timeout=110,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", RUN_ELSEWHERE)
def test_pages_that_other_tests_run_are_run_there(page: str) -> None:
    assert Path(page).name in (ROOT / RUN_ELSEWHERE[page]).read_text(encoding="utf-8")


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_json_is_a_configuration(block: Block) -> None:
    load_config(json.loads(block.text))


@pytest.mark.parametrize("block", of("toml"), ids=str)
def test_toml_parses(block: Block) -> None:
    assert tomllib.loads(block.text)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize("block", of("shell"), ids=str)
def test_shell_parses(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, check=False, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize("block", [b for b in of("shell") if b.text.startswith("netloader ")], ids=str)
def test_shell_runs(block: Block, tmp_path: Path) -> None:
    # `netloader` is this checkout's; the port of the example may be in use here, so it is replaced.
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = tmp_path / "bin" / "netloader"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m netloader "$@"\n')
    command.chmod(0o755)
    text = block.text.replace(EXAMPLE_PORT, str(port))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{text}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=110,
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_have_a_target(page: Path) -> None:
    dead = []
    for found in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        target, _, anchor = found["target"].partition("#")
        if "://" in target:
            continue
        place = (page.parent / target).resolve() if target else page
        if not place.exists() or (anchor and anchor not in headings(place)):
            dead.append(found["target"])
    assert dead == []
