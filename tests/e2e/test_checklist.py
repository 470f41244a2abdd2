"""The hardware checklist's checks with engines, on the processor: they pass, and faults turn them red.

What only an NPU can show is left out there (sleep, hccl). `tests/hccl/test_engine_checks.py` has many more faults, and
`tests/ascend/test_checklist.py` has engines of vllm-ascend.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.engines import ARGUMENTS
from tests.hccl.checklists import Result, run_checklist
from tests.models import ModelStore

pytestmark = pytest.mark.slow

KIND, OTHER = "llama-bf16", "llama-bf16-other"


def checklist(model: Path, report: Path, *options: str) -> Result:
    return run_checklist(model, report, "--cpu", "--pulls", "5", *options, engine=("--enforce-eager", *ARGUMENTS))


def test_engines_without_a_fault_pass(models: ModelStore, tmp_path: Path) -> None:
    found = checklist(models.get(KIND), tmp_path / "report")
    assert found.outcomes == {
        "engine_reference": "PASS",
        "engine_serve": "PASS",
        "engine_beside": "PASS",
        "engine_pull": "PASS",
        "engine_equal": "PASS",
        "engine_serve_again": "PASS",
        "engine_sleep": "MANUAL",
        "engine_reload": "PASS",
        "engine_stop": "PASS",
        "engine_two_hosts": "MANUAL",
        "engine_ranks": "MANUAL",
        "engine_graph": "MANUAL",
    }, found.texts
    assert found.status == 0
    assert "target: pulled " in found.texts["engine_pull"]
    assert int(found.texts["engine_beside"].partition(" pulls over ")[0]) >= 5


def test_a_seed_with_other_weights_turns_the_comparison_red(models: ModelStore, tmp_path: Path) -> None:
    """The client has no weight files, and nothing else says which weights are meant."""
    only = "engine_reference,engine_serve,engine_pull,engine_equal"
    options = ("--only", only, "--seed-model", str(models.get(OTHER)))
    found = checklist(models.get(KIND), tmp_path / "report", *options)
    assert list(found.outcomes.values()) == ["PASS", "PASS", "PASS", "FAIL"], found.texts
    assert "8 of 8 prompts are answered differently" in found.texts["engine_equal"]
    assert found.status == 1


def test_an_engine_that_serves_nothing_turns_the_checklist_red(models: ModelStore, tmp_path: Path) -> None:
    options = ("--only", "engine_serve,engine_pull", "--settings", '{"SERVE": false}')
    found = checklist(models.get(KIND), tmp_path / "report", *options)
    assert found.outcomes == {"engine_serve": "FAIL", "engine_pull": "SKIP"}
    assert "of 1 ranks only [] serve" in found.texts["engine_serve"]
    assert found.status == 1
