"""vLLM's own loading on a simulated NPU, in a process of its own, because the simulator patches torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.npu_sim.test_simulator import environment
from tests.vllm.releases import KNOWS_PROCESSED

ROOT = Path(__file__).resolve().parents[2]
FAKES = ROOT / "tests" / "npu_sim" / "fakes"
METADATA = "Metadata-Version: 2.1\nName: netloader-test-npu\nVersion: 0\n"
ENTRY_POINTS = "[vllm.platform_plugins]\nnetloader_test_npu = tests.vllm.npu.plugin:platform\n"


@pytest.mark.skipif(not KNOWS_PROCESSED, reason="the platform of these tests is written for a newer vLLM")
def test_vllm_loads_on_the_simulated_device(tmp_path: Path) -> None:
    installed = tmp_path / "netloader_test_npu-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(METADATA, encoding="utf-8")
    (installed / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    paths = os.pathsep.join(str(path) for path in (tmp_path, FAKES, ROOT))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"]
    done = subprocess.run(
        [*command, "-o", "timeout=600", "-o", "faulthandler_timeout=700", "tests/vllm/npu"],
        check=False,
        capture_output=True,
        text=True,
        timeout=800,
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-30_000:] + done.stderr[-5_000:]
    assert " passed" in done.stdout
