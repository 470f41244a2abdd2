"""Runs the hardware checklist with engines, as its user does, and reads its report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hccl.processes import ROOT

_LONGEST = 800.0
_END = 90.0


@dataclass(frozen=True)
class Result:
    """What the checklist found.

    Attributes:
        status: The exit status.
        outcomes: PASS, FAIL and so on, by the name of a line.
        texts: What each line says.
    """

    status: int
    outcomes: Mapping[str, str]
    texts: Mapping[str, str]


def run_checklist(
    model: Path, report: Path, *options: str, engine: tuple[str, ...] = (), more: Mapping[str, str] | None = None
) -> Result:
    """Run the checklist to its end.

    Args:
        model: Folder of the model.
        report: Folder for the report.
        options: Of the checklist.
        engine: Arguments of each engine.
        more: Environment variables.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.hccl_checklist", str(model), "--report", str(report), *options, "--", *engine],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **(more or {})},
        cwd=ROOT,
    )
    try:
        printed, errors = process.communicate(timeout=_LONGEST)
    except BaseException:
        process.send_signal(signal.SIGINT)  # so that it ends its engines
        process.communicate(timeout=_END)
        raise
    assert printed.endswith(f"report: {report}\n"), errors
    found: dict[str, Any] = json.loads((report / "report.json").read_text(encoding="utf-8"))
    assert found["failed"] is (process.returncode != 0)
    lines = found["checks"]
    return Result(
        process.returncode,
        {line["name"]: line["outcome"] for line in lines},
        {line["name"]: line["text"] for line in lines},
    )
