"""The benchmarks run, and their table says what was measured. Speed itself is not tested."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.goals import GOALS, read, table
from benchmarks.hosts import why_not
from benchmarks.suite import PARTS, machine
from tests.preloaded import PYTHON_THAT_STARTS_OTHERS

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> list[dict[str, Any]]:
    """The JSON lines that a benchmark prints."""
    done = subprocess.run(
        [PYTHON_THAT_STARTS_OTHERS, *arguments], check=False, capture_output=True, text=True, timeout=110, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_single_pull_is_measured_by_case_and_phase() -> None:
    cases = ["plain", "gloo", "tcp", "shm", "raw_tcp_1", "raw_tcp_bounded_2", "memcpy_1"]
    arguments = ["-m", "benchmarks.single_pull", "--workload", "tiny", "--rounds", "1"]
    lines = run(*arguments, *(part for case in cases for part in ("--case", case)))
    summaries = {line["summary"]: line for line in lines if "summary" in line}
    assert list(summaries) == cases
    for case in ("gloo", "tcp", "shm"):
        assert summaries[case]["times_as_fast_as_plain"] > 0
        assert 0 < summaries[case]["median_before_first_request"] <= summaries[case]["median_seconds"]
        assert summaries[case]["median_phases"]["connect"] > 0


def test_memory_beyond_the_destination_is_measured() -> None:
    (line,) = run("-m", "benchmarks.extra_memory", "--workload", "tiny", "--transport", "tcp")
    assert line["client_with_first_use_MiB"] >= line["client_MiB"]


def test_replicas_on_simulated_hosts_relay_their_blocks() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    (line,) = run(
        *("-m", "benchmarks.fan_out", "--clients", "2", "--mbit", "100", "--seconds", "0.5", "--mode", "relays")
    )
    assert line["clients"] == 2
    assert line["from_the_seed"] >= line["bytes"] - 2


def write(path: Path, *lines: Mapping[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def test_the_table_compares_the_newest_figures_with_the_goals(tmp_path: Path) -> None:
    summary = {"part": "llama", "workload": "llama", "summary": "tcp"}
    path = write(
        tmp_path / "lines.jsonl",
        machine(),
        {**summary, "times_as_fast_as_plain": 1.0, "cpu_of_plain": 0.44},
        {"part": "llama", "case": "tcp", "round": 1, "workload": "llama"},
        {**summary, "times_as_fast_as_plain": 3.25, "cpu_of_plain": 0.5},
        {"part": "memory", "transport": "shm", "client_MiB": 2.0, "server_MiB": 17.0},
        {"part": "fan_out_8", "mode": "relays", "times_serial": 6.0, "seconds": 25.0},
        {"part": "fan_out_4", "mode": "relays", "times_serial": 1.0, "seconds": 25.0},
        {"part": "striping", "sources": 3, "times_one": 2.5},
    )
    rows = {row.split(" | ")[0].lstrip("| "): row.split(" | ")[3:] for row in table(path)[2:]}
    assert len(rows) == len(GOALS)
    assert rows["tcp, Llama-shaped, against the plain gloo loop"] == ["3.25 x", "reached |"]
    assert rows["processor seconds of tcp, of the plain gloo loop's"] == ["0.5 x", "**missed** |"]
    assert rows["memory beyond the destination, shm"] == ["17 MiB", "**missed** |"]
    assert rows["8 clients with relays, against one after the other"] == ["6 x", "reached |"]
    assert rows["3 seeds, against one"] == ["2.5 x", "**missed** |"]
    assert rows["fixed cost of a pull by tcp"][0] == "not measured"


def test_the_fastest_raw_loop_is_the_reference(tmp_path: Path) -> None:
    line = {"part": "llama", "workload": "llama", "summary": "tcp-unverified"}
    ratios = {"raw_tcp_1": 1.2, "raw_tcp_2": 0.8, "raw_tcp_bounded_2": 0.7, "read_memory_2": 0.3}
    path = write(tmp_path / "x", {**line, **{f"times_as_fast_as_{raw}": ratio for raw, ratio in ratios.items()}})
    assert read(path).of_best_raw_tcp("tcp-unverified") == 0.7


def test_every_part_of_the_suite_is_an_existing_module() -> None:
    for arguments in PARTS.values():
        module = arguments[arguments.index("-m") + 1]
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
