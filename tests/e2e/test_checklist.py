"""The hardware checklist's checks with engines, on the processor: they pass, and faults turn them red.

What only an NPU can show is left out there (sleep, hccl). `tests/hccl/test_engine_checks.py` has many more faults.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import ARGUMENTS
from tests.hccl.processes import ROOT
from tests.models import ModelStore

pytestmark = pytest.mark.slow

KIND, OTHER = "llama-bf16", "llama-bf16-other"


def checklist(model: Path, report: Path, *options: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """The exit status, and the outcome and the text of each line."""
    command = [sys.executable, "-m", "scripts.hccl_checklist", str(model), "--cpu", "--report", str(report), *options]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [*command, "--pulls", "5", "--", "--enforce-eager", *ARGUMENTS],
        check=False,
        capture_output=True,
        text=True,
        timeout=800,
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
    )
    assert done.stdout.endswith(f"report: {report}\n"), done.stderr
    found: dict[str, Any] = json.loads((report / "report.json").read_text(encoding="utf-8"))
    assert found["failed"] is (done.returncode != 0)
    return done.returncode, {line["name"]: (line["outcome"], line["text"]) for line in found["checks"]}


def test_engines_without_a_fault_pass(models: ModelStore, tmp_path: Path) -> None:
    status, lines = checklist(models.get(KIND), tmp_path / "report")
    assert {name: outcome for name, (outcome, _) in lines.items() if name.startswith("engine_")} == {
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
    }, lines
    assert status == 0
    assert "target: pulled " in lines["engine_pull"][1]
    assert int(lines["engine_beside"][1].partition(" pulls over ")[0]) >= 5


def test_a_seed_with_other_weights_turns_the_comparison_red(models: ModelStore, tmp_path: Path) -> None:
    """The client has no weight files, and nothing else says which weights are meant."""
    only = "engine_reference,engine_serve,engine_pull,engine_equal"
    options = ("--only", only, "--seed-model", str(models.get(OTHER)))
    status, lines = checklist(models.get(KIND), tmp_path / "report", *options)
    assert [outcome for outcome, _ in lines.values()] == ["PASS", "PASS", "PASS", "FAIL"], lines
    assert "8 of 8 prompts are answered differently" in lines["engine_equal"][1]
    assert status == 1


def test_an_engine_that_serves_nothing_turns_the_checklist_red(models: ModelStore, tmp_path: Path) -> None:
    options = ("--only", "engine_serve,engine_pull", "--settings", '{"SERVE": false}')
    status, lines = checklist(models.get(KIND), tmp_path / "report", *options)
    assert lines["engine_serve"][0] == "FAIL"
    assert "of 1 ranks only [] serve" in lines["engine_serve"][1]
    assert lines["engine_pull"] == ("SKIP", "engine_serve did not pass")
    assert status == 1
