"""A forked process is like one that was started: the same questions to both, and what is to differ does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.preloaded import PYTHON, PYTHON_THAT_STARTS_OTHERS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each process is a fresh one")

ABOUT_ITSELF = """
import json, os, signal, sys, warnings
print(json.dumps({
    "parent": os.getppid(), "group": os.getpgrp(), "session": os.getsid(0), "folder": os.getcwd(),
    "arguments": sys.argv, "environment": dict(os.environ), "name": __name__, "said": sys.stdin.read(),
    "descriptors": sorted(map(int, os.listdir("/proc/self/fd")))[:-1], "path": sys.path[0],
    "actions": [found[0] for found in warnings.filters[:1]], "encoding": sys.stdout.encoding,
    "hears Ctrl-C": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
}))
print("to stderr", file=sys.stderr)
sys.exit(7)
"""


def asked(python: str, folder: Path) -> tuple[dict[str, object], str, int]:
    done = subprocess.run(
        [python, "-W", "error", "-c", ABOUT_ITSELF, "one", "two words"],
        input="hear this",
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "SOME": "a=b"},
    )
    return json.loads(done.stdout), done.stderr, done.returncode


def test_it_is_like_a_fresh_one(tmp_path: Path) -> None:
    forked, fresh = asked(PYTHON, tmp_path), asked(sys.executable, tmp_path)
    assert forked == fresh
    assert forked[0]["parent"] == os.getpid()
    assert forked[0]["hears Ctrl-C"] is True
    assert forked[2] == 7


def test_torch_is_there_and_netloader_is_not() -> None:
    text = "import sys; print('torch' in sys.modules, any(n.startswith('netloader') for n in sys.modules))"
    forked = subprocess.run([PYTHON, "-c", text], check=True, capture_output=True, text=True, timeout=60)
    fresh = subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True, timeout=60)
    assert (forked.stdout, fresh.stdout) == ("True False\n", "False False\n")


def test_its_modules_and_its_exit_handlers_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import atexit, sys\n"
        "class Noisy:\n"
        "    def __del__(self): print('taken apart', flush=True)\n"
        "noisy = Noisy()\n"
        "atexit.register(print, 'exit handler', flush=True)\n"
        "assert sys.modules['__main__'].noisy is noisy\n"
        "raise KeyError('at the end')\n",
        encoding="ascii",
    )
    command = [PYTHON, "-m", "program"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("KeyError: 'at the end'\n")
    assert done.stdout == "exit handler\ntaken apart\n"


def test_only_what_it_loaded_itself_is_finalized() -> None:
    text = (
        "import weakref; print(sum(each.atexit for each in weakref.finalize._registry), flush=True); "
        "weakref.finalize(weakref, print, 'finalized', flush=True)"
    )
    done = subprocess.run([PYTHON, "-c", text], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\nfinalized\n"


def test_it_can_be_killed() -> None:
    with subprocess.Popen([PYTHON, "-c", "print(1, flush=True); input()"], stdin=subprocess.PIPE, stdout=-1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL


def test_what_it_starts_may_be_forked_too() -> None:
    inner = "import os, sys; print(os.getppid(), 'torch' in sys.modules)"
    outer = (
        f"import os, subprocess, sys; print(os.getpid(), flush=True); subprocess.run([sys.executable, '-c', {inner!r}])"
    )
    for python, loaded in ((PYTHON_THAT_STARTS_OTHERS, True), (PYTHON, False)):
        done = subprocess.run([python, "-c", outer], check=True, capture_output=True, text=True, timeout=60)
        parent, said = done.stdout.splitlines()
        assert said == f"{parent} {loaded}"


def test_what_only_a_fresh_one_can_do_is_done_by_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print('torch' in sys.modules)", encoding="ascii")
    for arguments in ([str(script)], ["-I", "-c", "import sys; print('torch' in sys.modules)"]):
        done = subprocess.run([PYTHON, *arguments], check=True, capture_output=True, text=True, timeout=60)
        assert done.stdout == "False\n"


@pytest.mark.parametrize("variable", ["LD_LIBRARY_PATH", "MALLOC_ARENA_MAX", "PYTHONOPTIMIZE"])
def test_what_is_read_once_is_read_by_a_fresh_one(variable: str) -> None:
    text = "import sys; print('torch' in sys.modules)"
    changed = {**os.environ, variable: "1"}
    done = subprocess.run([PYTHON, "-c", text], check=True, capture_output=True, text=True, timeout=60, env=changed)
    assert done.stdout == "False\n"
