"""Runs a program in a network namespace of its own, with the interfaces that a test wants."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.preloaded import PYTHON

ROOT = Path(__file__).parents[2]

_ENTER = """\
import ctypes, os, subprocess, sys
if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):  # CLONE_NEWNET
    sys.exit(77)
for line in {lines!r}:
    if subprocess.run(["ip", *line.split()], capture_output=True).returncode:
        sys.exit(77)
import torch
import netloader
"""
_NOT_POSSIBLE = 77

PAIR = ("link set lo up", "link add v0 type veth peer name v1", "link set v0 up", "link set v1 up")
"""Two interfaces that are connected with each other, and have no address that other hosts could reach."""


def run_in_network(lines: Sequence[str], program: str) -> tuple[list[str], str]:
    """The lines that `program` prints, and its log, in a network made by these ``ip`` commands.

    The test is skipped where this user may not make one.
    """
    if shutil.which("ip") is None:
        pytest.skip("there is no command `ip` here")
    done = subprocess.run(
        [PYTHON, "-c", _ENTER.format(lines=list(lines)) + program],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
    )
    if done.returncode == _NOT_POSSIBLE:
        pytest.skip("this user may not make a network namespace with these interfaces")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines(), done.stderr
