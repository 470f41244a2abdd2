"""The HCCL transport on a simulated device: each file of `inside` runs in a separate process.

A process cannot change its set of devices, so tests on the simulated device can't share a process with other tests.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.preloaded import PYTHON

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INSIDE = sorted((HERE / "inside").glob("test_*.py"))
PROCESSES = 3
"""It takes a process longer to load torch than most of the files take to run."""


def environment() -> dict[str, str]:
    """The environment of a process with the simulated device."""
    hidden = ("HCCL_", "P2P_HCCL_", "TORCH_HCCL_", "RANK_TABLE_FILE", "ROOTINFO_", "ASCEND_RT_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return kept | {
        "NETLOADER_NPU_SIM": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "PYTHONPATH": os.pathsep.join([str(HERE / "fakes"), str(ROOT)]),
    }


@pytest.mark.parametrize("files", [INSIDE[n::PROCESSES] for n in range(PROCESSES)], ids=lambda files: files[0].stem)
def test_a_file_of_tests_on_the_simulated_device(files: list[Path]) -> None:
    # torch warns that devices implemented in Python are experimental.
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", *map(str, files)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=110, cwd=ROOT, env=environment()
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    assert " passed" in done.stdout
