"""The released torch_npu, its C++ process group included, over a stand-in for CANN.

The stand-in logs calls of HCCL. A test process never imports torch_npu; its children do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hccl import scenarios
from tests.hccl.processes import ROOT, Child, clean_environment


@pytest.fixture(params=["silent", "asynchronous"])
def real(request: pytest.FixtureRequest) -> dict[str, str]:
    """The environment of the processes; with the second parameter HCCL reports lost peers itself."""
    folder = os.environ["NETLOADER_STAND_IN"]
    extra = {"LD_LIBRARY_PATH": folder, "PYTHONPATH": str(ROOT), "STAND_IN_LOG": "1"}
    if request.param == "asynchronous":
        extra["STAND_IN_ASYNC_ERROR"] = "1"
    return clean_environment(extra)


def communicators(child: Child) -> list[str]:
    return [line.partition("] ")[2].strip() for line in child.log if "communicator ready" in line]


def test_a_pull_is_bit_exact_and_both_processes_end(real: dict[str, str]) -> None:
    source, one = scenarios.a_pull_is_right(real)
    # One communicator each, of point-to-point size: no barrier made a second one, which would be ten times as large.
    assert communicators(source) == ["communicator ready: rank 1 of 2, buffer 20 MB"]
    assert communicators(one) == ["communicator ready: rank 0 of 2, buffer 20 MB"]
    for child in (source, one):
        assert sum("communicator destroyed" in line for line in child.log) == 1


def test_receivers_that_die_do_not_disturb_the_seed(real: dict[str, str]) -> None:
    scenarios.receivers_that_die_cost_the_seed_nothing(real)


def test_a_lost_seed_is_an_error_at_the_receiver(real: dict[str, str]) -> None:
    scenarios.a_lost_seed_is_an_error(real)


@pytest.mark.parametrize("switched", [True, False])
def test_without_blocking_wait_a_lost_peer_ends_the_process(
    real: dict[str, str], switched: bool, tmp_path: Path
) -> None:
    program = str(Path(__file__).parent / "lost.py")
    ends = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", program, str(rank), str(tmp_path / "store"), str(int(switched))],
            env=real,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for rank in (0, 1)
    ]
    said, _ = ends[0].communicate(timeout=100)
    ends[1].communicate(timeout=100)
    if switched:
        assert "raised " in said, said
        assert ends[0].returncode == 0
    else:
        assert "nothing was raised" in said
        assert ends[0].returncode == -signal.SIGABRT
