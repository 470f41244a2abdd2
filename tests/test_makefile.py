"""The environments of the Makefile: each belongs to one Python and to one release, and none is used for another."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PYTHON = """\
#!/bin/sh
case "$*" in
    *print*) echo {version} ;;
    '-m venv '*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    '-m pip install '*) echo "$0 installs" ;;
esac
"""
"""An interpreter that says its version, makes environments of itself, and installs nothing."""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    for version in ("3.11", "3.12", "3.13", "3.13t"):
        _interpreter(tmp_path / f"python{version}", version)
    return tmp_path


def _interpreter(path: Path, version: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PYTHON.format(version=version), encoding="utf-8")
    path.chmod(0o755)


def make(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    return subprocess.run(
        ["make", *arguments], cwd=tree, check=False, capture_output=True, text=True, timeout=60, env=own
    )


def installed(done: subprocess.CompletedProcess[str]) -> set[str]:
    """The environments in which something was installed."""
    assert done.returncode == 0, done.stdout + done.stderr
    return {line.partition("/")[0] for line in done.stdout.splitlines() if line.endswith(" installs")}


@pytest.mark.parametrize(
    ("version", "environment"),
    [("3.11", ".venv"), ("3.12", ".venv-py3.12"), ("3.13", ".venv-py3.13"), ("3.13t", ".venv-py3.13t")],
)
def test_each_python_has_an_environment_of_its_own(version: str, environment: str, tree: Path) -> None:
    assert installed(make(tree, "setup", "PYTHON=./python3.11")) == {".venv"}
    _interpreter(tree / "python3", version)  # whatever it is called
    again = make(tree, "setup", "PYTHON=./python3")
    assert installed(again) == {environment} - {".venv"}
    assert (tree / environment / f".stamp-{version}").is_file()
    assert installed(make(tree, "setup", "PYTHON=./python3")) == set(), "once"
    assert installed(make(tree, "setup", "PYTHON=./python3.11")) == set(), "the other one is as it was"


def test_an_environment_of_another_python_is_refused(tree: Path) -> None:
    """One that an older Makefile made, say: its name did not tell."""
    _interpreter(tree / ".venv/bin/python", "3.12")
    (tree / ".venv/.stamp").touch()
    done = make(tree, "setup", "PYTHON=./python3.11")
    assert done.returncode != 0
    assert ".venv has Python 3.12, and ./python3.11 is 3.11: delete .venv, then make again\n" in done.stderr
    assert "installs" not in done.stdout
    assert (tree / ".venv/.stamp").exists(), "it is left alone"


def test_an_interpreter_that_is_not_there_makes_nothing(tree: Path) -> None:
    (tree / ".venv").mkdir()
    (tree / ".venv/.stamp-3.11").touch()
    done = make(tree, "setup", "PYTHON=./python4")
    assert done.returncode != 0
    assert "netloader needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." in done.stderr


def test_another_release_is_installed_and_only_the_last_one_is_there(tree: Path) -> None:
    for version in ("0.1", "0.2", "0.1"):
        done = make(tree, "setup-vllm", "PYTHON=./python3.11", f"VLLM_VERSION={version}")
        assert installed(done) == {".venv-vllm"}
        assert [each.name for each in (tree / ".venv-vllm").glob(".stamp*")] == [f".stamp-3.11-{version}"]
    assert installed(make(tree, "setup-vllm", "PYTHON=./python3.11", "VLLM_VERSION=0.1")) == set()


def test_every_environment_carries_the_python(tree: Path) -> None:
    done = make(tree, "--print-data-base", "--question", "PYTHON=./python3.13", "help")
    found = dict(line.split(" := ") for line in done.stdout.splitlines() if " := .venv" in line)
    assert {name for name in found if name.endswith("VENV")} == {
        *("VENV", "DEMO_VENV", "BENCH_VENV", "VLLM_VENV", "OLDEST_VENV", "NPU_VENV", "ASCEND_VENV", "ASCEND_SIM_VENV")
    }
    assert all("-py3.13" in value or "$(OTHER_PYTHON)" in value for value in found.values())


PROGRAMS = ("redis-server", "redis-cli", "etcd", "etcdctl", "dnsmasq", "prometheus")


def services(folder: Path, *there: str) -> subprocess.CompletedProcess[str]:
    """`make services` of a user who may not install anything, with only these programs on the path."""
    for name in (*there, "id"):
        (folder / name).write_text("#!/bin/sh\necho 1000\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    command = ["/bin/sh", str(ROOT / "scripts/services.sh")]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env={"PATH": str(folder)})


def test_services_that_are_there_need_no_root(tmp_path: Path) -> None:
    done = services(tmp_path, *PROGRAMS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_services_that_are_missing_are_named_by_package(tmp_path: Path) -> None:
    done = services(tmp_path, "redis-server", "redis-cli", "dnsmasq")
    missing = "etcd-server etcd-client prometheus"
    assert done.returncode == 1
    assert done.stderr == f"missing: {missing} (as root: apt-get install {missing})\n"
