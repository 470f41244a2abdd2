"""The goals of the measurements, and the table that says whether they are reached."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["GOALS", "Goal", "Measured", "read", "table"]


@dataclass(frozen=True)
class Measured:
    """The newest line of each kind in a file of JSON lines."""

    summaries: Mapping[tuple[str, str], Mapping[str, Any]]
    memory: Mapping[str, Mapping[str, Any]]
    fan_out: Mapping[tuple[int, str], Mapping[str, Any]]
    striping: Mapping[int, Mapping[str, Any]]

    def ratio(self, workload: str, case: str, key: str) -> float | None:
        """A figure from the summary of one case."""
        value = self.summaries.get((workload, case), {}).get(key)
        return None if value is None else float(value)

    def of_best_raw_tcp(self, case: str) -> float | None:
        """Speed of a case relative to the fastest raw TCP loop of that run."""
        summary = self.summaries.get(("llama", case), {})
        known = [float(value) for key, value in summary.items() if key.startswith("times_as_fast_as_raw_tcp")]
        return min(known) if known else None


@dataclass(frozen=True)
class Goal:
    """One row of the table.

    Attributes:
        text: What is measured.
        least: The value that must be reached.
        aim: The value that should be reached.
        value: Returns the measured value; None if it was not measured.
        unit: ``x`` for a ratio, or a unit.
        lower: Whether a lower value is better.
    """

    text: str
    least: float
    aim: float
    value: Callable[[Measured], float | None]
    unit: str = "x"
    lower: bool = False


def _times_plain(workload: str, case: str) -> Callable[[Measured], float | None]:
    return lambda found: found.ratio(workload, case, "times_as_fast_as_plain")


def _milliseconds(workload: str, case: str, key: str) -> Callable[[Measured], float | None]:
    def value(found: Measured) -> float | None:
        seconds = found.ratio(workload, case, key)
        return None if seconds is None else seconds * 1e3

    return value


def _memory(transport: str) -> Callable[[Measured], float | None]:
    def value(found: Measured) -> float | None:
        line = found.memory.get(transport)
        return None if line is None else max(float(line["client_MiB"]), float(line["server_MiB"]))

    return value


def _fan_out(mode: str, key: str) -> Callable[[Measured], float | None]:
    def value(found: Measured) -> float | None:
        line = found.fan_out.get((8, mode), {})
        return None if key not in line else float(line[key])

    return value


def _striping(found: Measured) -> float | None:
    line = found.striping.get(3, {})
    return float(line["times_one"]) if line else None


GOALS: tuple[Goal, ...] = (
    Goal("tcp, Llama-shaped, against the plain gloo loop", 3, 5, _times_plain("llama", "tcp")),
    Goal(
        "tcp, unverified, against the best raw TCP loop",
        0.9,
        0.97,
        lambda found: found.of_best_raw_tcp("tcp-unverified"),
    ),
    Goal("tcp, one tensor of 1 GiB, against the plain gloo loop", 1.5, 2.5, _times_plain("one", "tcp")),
    Goal("tcp, 20,000 small tensors, against the plain gloo loop", 40, 80, _times_plain("small", "tcp")),
    Goal("shm, Llama-shaped, against the plain gloo loop", 6, 8, _times_plain("llama", "shm")),
    Goal(
        "shm, unverified, against reading the memory with 2 threads",
        0.9,
        1.0,
        lambda found: found.ratio("llama", "shm-unverified", "times_as_fast_as_read_memory_2"),
    ),
    Goal("gloo, Llama-shaped, against the plain gloo loop", 1.8, 2.3, _times_plain("llama", "gloo")),
    Goal("gloo, 20,000 small tensors, against the plain gloo loop", 8, 30, _times_plain("small", "gloo")),
    Goal(
        "processor seconds of tcp, of the plain gloo loop's",
        0.45,
        0.40,
        lambda found: found.ratio("llama", "tcp", "cpu_of_plain"),
        lower=True,
    ),
    Goal(
        "tcp with verification, against without",
        0.8,
        0.87,
        lambda found: found.ratio("llama", "tcp", "times_as_fast_as_tcp-unverified"),
    ),
    Goal("fixed cost of a pull by tcp", 10, 3, _milliseconds("tiny", "tcp", "median_seconds"), "ms", lower=True),
    Goal("fixed cost of a pull by shm", 10, 3, _milliseconds("tiny", "shm", "median_seconds"), "ms", lower=True),
    Goal(
        "20,000 tensors by tcp: from the call to the first request",
        100,
        100,
        _milliseconds("small", "tcp", "median_before_first_request"),
        "ms",
        lower=True,
    ),
    Goal("memory beyond the destination, tcp", 16, 4, _memory("tcp"), "MiB", lower=True),
    Goal("memory beyond the destination, shm", 16, 4, _memory("shm"), "MiB", lower=True),
    Goal("memory beyond the destination, gloo", 32, 16, _memory("gloo"), "MiB", lower=True),
    Goal("8 clients with relays, against one after the other", 5.5, 7, _fan_out("relays", "times_serial")),
    Goal(
        "the same with one relay killed, of the undisturbed time",
        1.5,
        1.2,
        _fan_out("killed", "of_undisturbed"),
        lower=True,
    ),
    Goal("3 seeds, against one", 2.6, 2.9, _striping),
)


def read(path: Path) -> Measured:
    """Read a file of JSON lines; the last line of each kind counts."""
    summaries: dict[tuple[str, str], dict[str, Any]] = {}
    memory: dict[str, dict[str, Any]] = {}
    fan_out: dict[tuple[int, str], dict[str, Any]] = {}
    striping: dict[int, dict[str, Any]] = {}
    for text in path.read_text("utf-8").splitlines():
        line = json.loads(text)
        match line["part"].partition("_")[0]:
            case "llama" | "one" | "small" | "tiny" if "summary" in line:
                summaries[line["workload"], line["summary"]] = line
            case "memory":
                memory[line["transport"]] = line
            case "fan":
                fan_out[int(line["part"].rpartition("_")[2]), line["mode"]] = line
            case "striping":
                striping[line["sources"]] = line
    return Measured(summaries, memory, fan_out, striping)


def table(path: Path) -> list[str]:
    """The goals and the measured values, as a Markdown table."""
    found = read(path)
    lines = ["| | at least | aim | measured | |", "| --- | --- | --- | --- | --- |"]
    for goal in GOALS:
        value = goal.value(found)
        sign = "at most " if goal.lower else ""
        if value is None:
            shown, verdict = "not measured", ""
        else:
            shown = f"{value:.3g} {goal.unit}"
            reached = value <= goal.least if goal.lower else value >= goal.least
            verdict = "reached" if reached else "**missed**"
        lines.append(
            f"| {goal.text} | {sign}{goal.least:g} {goal.unit} | {goal.aim:g} {goal.unit} | {shown} | {verdict} |"
        )
    return lines
