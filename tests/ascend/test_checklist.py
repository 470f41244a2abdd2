"""The hardware checklist with real `vllm serve` processes of vllm-ascend on the simulated NPU.

Nothing computes there: `tests/ascend/serving/npu_engine.py` makes answers from the weights. So the lines about answers
compare weights, and show that the checklist works; they are no evidence for what an NPU computes.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.ascend import processes
from tests.ascend.kinds import KINDS, Store
from tests.hccl.checklists import run_checklist
from tests.hccl.processes import ROOT

SERVING = Path(__file__).parent / "serving"
CHECKS = ("reference", "serve", "beside", "pull", "equal", "serve_again", "reload", "stop")


@pytest.mark.slow
def test_engines_of_vllm_ascend_serve_and_pull_over_hccl(store: Store, tmp_path: Path) -> None:
    names = [f"engine_{check}" for check in CHECKS]
    path = os.pathsep.join([str(processes.FAKES), str(SERVING), str(ROOT)])
    found = run_checklist(
        store.get(KINDS["llama"].model),
        tmp_path / "report",
        *("--only", ",".join(names), "--pulls", "3", "--no-sleep"),
        engine=("--enforce-eager", "--max-model-len", "512", "--kv-cache-memory-bytes", str(1 << 25)),
        more=processes.environment(PYTHONPATH=path, PYTHONUNBUFFERED="1"),
    )
    expected = dict.fromkeys(names, "PASS") | {"engine_reload": "MANUAL"}
    assert found.outcomes == expected, found.texts
    pulls = int(found.texts["engine_beside"].partition(" pulls over hccl")[0])
    assert pulls >= 3, "as many as were asked for, and those that ran at the end"
    assert " over hccl; root " in found.texts["engine_pull"]
