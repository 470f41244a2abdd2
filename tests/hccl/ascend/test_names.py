"""vllm-ascend has its own loader under the name `netloader`. vLLM calls plugins in no defined order."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hccl.processes import ROOT, clean_environment

OURS, THEIRS = "netloader", "ascend_model_loader"
FAKES = ROOT / "tests" / "npu_sim" / "fakes"


def registered(*order: str) -> dict[str, str]:
    """The loader that vLLM has under the name, in a new process that loads plugins in this order."""
    environment = clean_environment(
        # Its platform would need a device, so the plugins are named explicitly.
        {"VLLM_PLUGINS": "none", "PYTHONPATH": os.pathsep.join([str(FAKES), str(ROOT)])}
    )
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "registered.py"), *order]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=250, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_both_loaders_are_installed_as_plugins() -> None:
    names = {entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")}
    assert {OURS, THEIRS} <= names


@pytest.mark.parametrize("order", [(OURS, THEIRS), (THEIRS, OURS)], ids="-then-".join)
def test_vllm_uses_the_loader_of_this_package(order: tuple[str, ...]) -> None:
    loaders = registered(*order)
    assert loaders["netloader"].startswith("netloader.vllm."), loaders
    assert all(module.startswith("netloader.vllm.") for module in loaders.values()), loaders


def test_without_the_precaution_vllm_would_use_the_loader_of_vllm_ascend() -> None:
    """Control for the test above."""
    assert registered("-", OURS, THEIRS)["netloader"] == "vllm_ascend.model_loader.netloader.netloader"
