"""`.ci/run`: what it makes, in which order, and that a goal past its minutes fails it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAXIMUM = 75
"""Minutes for all goals together."""

MAKEFILE = """\
services:
\t@:
setup setup-other:
\t@echo installing $@
test other:
\t@cat; echo '==== 3 passed in 0.10s ===='
broken:
\t@echo '==== 1 failed in 0.10s ===='; exit 1
"""


def budget() -> list[tuple[str, int, str]]:
    lines = (line.partition("#")[0].split() for line in (ROOT / ".ci/budget").read_text(encoding="utf-8").splitlines())
    return [(goal, int(minutes), setup) for goal, minutes, setup in filter(None, lines)]


def ci(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Run `.ci/run` in a tree that has a Makefile of its own and this budget."""
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", folder / ".ci/run")
    (folder / ".ci/budget").write_text(text, encoding="utf-8")
    (folder / "Makefile").write_text(MAKEFILE, encoding="utf-8")
    compiler = folder / "bin/g++"  # where there is none, the script installs one
    compiler.parent.mkdir()
    compiler.touch(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environment["PATH"] = f"{compiler.parent}{os.pathsep}{os.environ['PATH']}"
    command = [str(folder / ".ci/run")]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=environment)


def test_the_goals_of_the_budget_exist_and_are_described() -> None:
    goals = budget()
    makefile, contributing = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "CONTRIBUTING.md"))
    assert goals[0][0] == "test"
    for goal, _, setup in goals:
        assert re.search(rf"^{goal}:.*$", makefile, re.MULTILINE), goal
        assert re.search(rf"^{setup}:", makefile, re.MULTILINE), setup
        assert f"| `make {goal}` |" in contributing
    section = re.search(r"`\.ci/run` [^\n]*\n(?:[^\n]+\n)*", contributing)
    assert section is not None
    assert set(re.findall(r"`make ([\w-]+)`", section[0].partition("leaves out")[0])) == {goal for goal, _, _ in goals}
    assert sum(minutes for _, minutes, _ in goals) < MAXIMUM


def test_goals_are_made_in_order_each_after_its_set_up(tmp_path: Path) -> None:
    done = ci(tmp_path, "# goal minutes set-up\nother 5 setup-other  # first\n\ntest 7 setup\n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert re.sub(r"\d\.\d", "0.0", done.stdout) == (
        "== make setup-other\ninstalling setup-other\n== make other\n==== 3 passed in 0.00s ====\n"
        "== make setup\ninstalling setup\n== make test\n==== 3 passed in 0.00s ====\n"
        "== summary\n"
        "other: ==== 3 passed in 0.00s ====\nother: 0.0 of 5 minutes, after 0.0 of set-up\n"
        "test: ==== 3 passed in 0.00s ====\ntest: 0.0 of 7 minutes, after 0.0 of set-up\n"
        "all: 0.0 minutes with set-up\n"
    )


def test_a_goal_past_its_minutes_fails_the_run_after_the_others(tmp_path: Path) -> None:
    done = ci(tmp_path, "test 0 setup\nother 5 setup-other\n")
    assert done.returncode == 1
    assert "other: ==== 3 passed" in done.stdout
    assert re.fullmatch(r"over budget: make test took \d\.\d minutes, and \.ci/budget allows 0\n", done.stderr)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("broken 5 setup\ntest 5 setup\n", "broken] Error 1"),
        ("missing 5 setup\n", "No rule to make target 'missing'"),
        ("test 5 missing\n", "No rule to make target 'missing'"),
        ("test five setup\n", "not 'goal minutes set-up' in .ci/budget: test five setup"),
        ("test 5\n", "not 'goal minutes set-up' in .ci/budget: test 5"),
        ("# nothing\n", "no goal in .ci/budget"),
    ],
)
def test_what_fails_ends_the_run(text: str, message: str, tmp_path: Path) -> None:
    done = ci(tmp_path, text)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert "== make test" not in done.stdout
