"""Every benchmark, one after the other: JSON lines into a file, then the table of goals.

Usage: ``python -m benchmarks.suite [--out build/benchmarks.jsonl] [--only NAME ...] [--rounds 7] [--table]``

Run it on an idle machine. The fan-out and striping parts need root and iproute2, because they make hosts with shaped
links. The vLLM part needs vLLM in the environment. A part that cannot run is named and skipped. Lines are appended to
the file, so parts may run at different times; the newest line of each kind counts.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.goals import table
from benchmarks.hosts import why_not

OUT = Path("build/benchmarks.jsonl")

_SINGLE = ("-m", "benchmarks.single_pull", "--workload")
_FAN_OUT = ("-m", "benchmarks.fan_out", "--clients")
_UNDISTURBED = ("--mode", "serial", "--mode", "concurrent", "--mode", "relays")
_RAW = ("raw_tcp_1", "raw_tcp_2", "raw_tcp_bounded_1", "raw_tcp_bounded_2", "read_memory_2")


def _cases(*names: str, against: tuple[str, ...]) -> list[str]:
    found = [part for name in names for part in ("--case", name)]
    return found + [part for name in against for part in ("--against", name)]


PARTS: dict[str, list[str]] = {
    "llama": [
        *_SINGLE,
        "llama",
        *_cases(
            *("plain", "gloo", "tcp", "tcp-unverified", "shm", "shm-unverified"),
            *_RAW,
            *("memcpy_1", "memcpy_2"),
            against=("plain", *_RAW, "tcp-unverified", "shm-unverified"),
        ),
    ],
    "one": [
        *_SINGLE,
        "one",
        *_cases(
            *("plain", "gloo", "tcp", "tcp-unverified", "shm", "shm-unverified"),
            *_RAW,
            "memcpy_2",
            against=("plain", *_RAW),
        ),
    ],
    "small": [
        *_SINGLE,
        "small",
        *_cases(
            *("plain", "gloo", "tcp", "tcp-unverified", "shm", "shm-unverified"),
            *("raw_tcp_1", "read_memory_2", "memcpy_1"),
            against=("plain", "raw_tcp_1", "read_memory_2"),
        ),
    ],
    "tiny": [*_SINGLE, "tiny", *_cases("plain", "gloo", "tcp", "shm", against=("plain",))],
    "memory": ["-m", "benchmarks.extra_memory", "--workload", "llama"],
    "fan_out_1": [*_FAN_OUT, "1", "--mode", "serial"],
    "fan_out_2": [*_FAN_OUT, "2", *_UNDISTURBED],
    "fan_out_4": [*_FAN_OUT, "4", *_UNDISTURBED],
    "fan_out_8": [*_FAN_OUT, "8"],
    "striping": ["-m", "benchmarks.striping"],
    "first_token": ["-m", "benchmarks.first_token"],
}
"""Name -> the arguments of python."""

_ROUNDS: Mapping[str, int] = MappingProxyType({"llama": 1, "one": 1, "small": 1, "tiny": 10, "first_token": 1})
"""Parts that have rounds, and how many for each one asked for: single pulls of `tiny` differ by half their time."""


def machine() -> dict[str, Any]:
    """The machine of the measurement, without anything that identifies it."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text("ascii", "replace").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    control = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return {
        "part": "machine",
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "congestion_control": control.read_text("ascii").strip() if control.exists() else "unknown",
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "load_before": round(os.getloadavg()[0], 2),
    }


def cannot(part: str) -> str | None:
    """Why a part cannot run here; None if it can."""
    if part.startswith(("fan_out", "striping")):
        return why_not()
    if part == "first_token" and importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed in this environment (make bench-vllm uses one that has it)"
    return None


def lines_of(part: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Run one part and yield its JSON lines.

    Raises:
        SystemExit: It failed.
    """
    more = ["--rounds", str(rounds * _ROUNDS[part])] if part in _ROUNDS else []
    command = [sys.executable, *PARTS[part], *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        if process.stdout is None:
            raise SystemExit("the benchmark has no output")
        for line in process.stdout:
            yield {"part": part, **json.loads(line)}
    if process.returncode:
        raise SystemExit(f"{' '.join(command[1:])} ended with status {process.returncode}")


def main() -> None:
    """Measure everything, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", action="append", choices=sorted(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--table", action="store_true", help="measure nothing: the table of what was measured before")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if not args.table:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(machine()) + "\n")
            for part in args.only or PARTS:
                reason = cannot(part)
                if reason is not None:
                    print(f"{part}: left out: {reason}", file=sys.stderr, flush=True)
                    continue
                began = time.monotonic()
                for line in lines_of(part, args.rounds):
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                print(f"{part}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print("\n".join(table(args.out)))


if __name__ == "__main__":
    main()
