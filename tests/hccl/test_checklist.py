"""The hardware checklist: its output without hardware, and its checks on the simulated device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from netloader.transports.hccl import HcclTransport
from scripts import hccl_checklist
from scripts.transport_checks import Where
from tests.hccl.processes import ROOT, clean_environment, seed
from tests.preloaded import PYTHON_THAT_STARTS_OTHERS

FAKES = ROOT / "tests" / "npu_sim" / "fakes"


def checklist(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [PYTHON_THAT_STARTS_OTHERS, "-W", "ignore", "-m", "scripts.hccl_checklist", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=110, env=environment, cwd=ROOT)


def simulated(**extra: str) -> dict[str, str]:
    return clean_environment({"PYTHONPATH": os.pathsep.join([str(FAKES), str(ROOT)]), **extra})


def test_without_an_npu_the_checklist_says_so_and_has_its_own_exit_status() -> None:
    done = checklist(clean_environment({"PYTHONPATH": str(ROOT)}))
    assert done.returncode == 3, done.stderr
    assert done.stdout == "NOTHING CHECKED: npu:0 cannot be used: torch_npu is not installed\n"


def test_the_checks_run_on_simulated_devices() -> None:
    done = checklist(simulated(), "--only", "versions,installed_contract,rank_table,formats")
    lines = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert lines == ["PASS versions", "PASS installed_contract", "PASS rank_table", "PASS formats"], done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("check", "measured"),
    [
        ("asleep", "3 rounds right, failed tries on the way: [1, 1, 1]"),
        ("graph", "the replay computed with them"),
        ("two_instances", "both ways right"),
        ("all_ranks_at_once", "2 ranks at once"),
    ],
)
def test_the_single_measurements_run_on_simulated_devices(check: str, measured: str) -> None:
    devices = ("--seed-device", "npu:0", "--receiver-devices", "npu:1,npu:2,npu:3")
    done = checklist(simulated(), "--only", check, "--mib", "24", *devices)
    assert done.stdout.startswith(f"PASS {check}: "), done.stdout
    assert measured in done.stdout
    assert done.returncode == 0


def test_two_devices_are_not_enough_for_a_check_with_two_ranks() -> None:
    done = checklist(simulated(), "--only", "all_ranks_at_once,two_hosts,blocked_ports")
    lines = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert lines == ["MANUAL all_ranks_at_once", "MANUAL blocked_ports", "MANUAL two_hosts"], done.stdout
    assert done.returncode == 0


def test_a_seed_on_another_host_can_be_given() -> None:
    """The other host is simulated by this one."""
    with seed(simulated(), "npu:2", mib=16) as (_, port):
        done = checklist(simulated(), "--only", "two_hosts", "--peer", f"127.0.0.1:{port}", "--peer-mib", "16")
        assert done.stdout.startswith("PASS two_hosts: 0.02 GB at "), done.stdout
        assert done.returncode == 0
        done = checklist(simulated(), "--only", "two_hosts", "--peer", f"127.0.0.1:{port}", "--peer-mib", "32")
        assert "FAIL two_hosts: AssertionError: " in done.stdout, "the sizes of both ends differ"
        assert "tensors differ" in done.stdout
        assert done.returncode == 1


IPTABLES = """#!/bin/sh
echo "$@" >>"$LOG_OF_RULES"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="the check asks for root")
def test_the_firewall_rule_is_removed_after_the_check(tmp_path: Path) -> None:
    """The simulated HCCL uses other ports, so the rule blocks nothing, which the check reports as a failure."""
    command = tmp_path / "iptables"
    command.write_text(IPTABLES)
    command.chmod(0o755)
    rules = tmp_path / "rules"
    environment = simulated(PATH=f"{tmp_path}:{os.environ['PATH']}", LOG_OF_RULES=str(rules), HCCL_IF_BASE_PORT="50000")
    done = checklist(environment, "--only", "blocked_ports", "--block-ports")
    assert "FAIL blocked_ports: AssertionError: ports 50000 to 50031 were blocked, and it was pulled" in done.stdout
    put, taken = rules.read_text().splitlines()
    assert put.startswith("-I INPUT -p tcp --dport 50000:50031 ")
    assert taken == put.replace("-I", "-D", 1)


def test_a_failed_check_is_reported_in_one_line_and_in_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def good(where: Where) -> str:
        return f"measured on {where.source}"

    def bad(where: Where) -> str:
        raise AssertionError(f"nothing came to {where.receivers[0]}")

    monkeypatch.setattr(hccl_checklist, "CHECKS", (bad, good))
    monkeypatch.setattr(HcclTransport, "missing", lambda self, device: None)
    monkeypatch.setattr(sys, "argv", ["hccl_checklist"])
    assert hccl_checklist.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["FAIL bad: AssertionError: nothing came to npu:1", "PASS good: measured on npu:0"]
    assert all(line.startswith("MANUAL ") for line in lines[2:])
    monkeypatch.setattr(hccl_checklist, "CHECKS", (good,))
    assert hccl_checklist.main() == 0
