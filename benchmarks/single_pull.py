"""One pull at a time, interleaved: netloader by transport, the plain gloo loop, and the raw reference cases.

Usage: ``python -m benchmarks.single_pull [--workload llama] [--case tcp --case plain ...] [--rounds 5] [--scale 1]``

Cases: ``plain`` (the baseline: one send and wait for each tensor over gloo, no checks), a transport's name (a verified
pull over it), a name with ``-unverified`` (the same without hashing, which shows the cost of hashing), and the raw
cases of ``benchmarks.raw`` (``raw_tcp_1``, ``raw_tcp_2``, ``raw_tcp_bounded_1``, ``raw_tcp_bounded_2``,
``read_memory_1``, ``read_memory_2``, ``memcpy_1``, ``memcpy_2``).

Prints one JSON line for each pull (seconds, processor seconds of both sides, seconds by phase, and seconds before the
first block was asked for) and one for each case with medians and, for every case named by ``--against``, the median of
the ratios of each round. The destination is allocated and touched beforehand. A pull is timed from the call to the last
verified byte, connecting included. Each server is its own process; the client is this process. Round 0 warms up and is
not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

import netloader
import netloader.tensors
from benchmarks.peers import plain_pull
from benchmarks.raw import RAW_CASES, RawCases
from benchmarks.workloads import WORKLOADS, make
from netloader.tensors import digest_of
from netloader.transports.base import BlockView

UNVERIFIED = "-unverified"


@contextmanager
def server(module: str, *args: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A server process and the line it printed when ready; the process is ended afterwards."""
    command = [sys.executable, "-m", module, *args]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the server process has no pipes")
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(timeout=30)


def cpu_seconds(pids: list[int]) -> float:
    """Processor seconds used so far by this process and the given ones, system calls included."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def pull_plain(port: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """One pull by the plain gloo loop."""
    with socket.create_connection(("127.0.0.1", port)) as control:
        plain_pull(control, tensors)
    return {}


class NetloaderPulls:
    """Pulls by netloader from one server.

    Args:
        port: The server's.
        tensors: What to fill.
    """

    def __init__(self, port: int, tensors: Mapping[str, torch.Tensor]) -> None:
        self._source = f"127.0.0.1:{port}"
        self._tensors = tensors
        self._digests: dict[int, bytes] = {}

    def run(self, case: str) -> dict[str, Any]:
        """One pull, by a transport's name."""
        transport = case.removesuffix(UNVERIFIED)
        verified = transport == case
        netloader.tensors.digest_of = self._hash if verified else self._recall  # type: ignore[assignment]
        try:
            report = netloader.sync.pull(
                self._tensors, netloader.ModelIdentity(model="bench"), sources=[self._source], transport=transport
            )
        finally:
            netloader.tensors.digest_of = digest_of
        return {"phases": {name: round(seconds, 4) for name, seconds in report.phases.as_dict().items()}}

    def _hash(self, view: BlockView, algorithm: str) -> bytes:
        digest = self._digests[view.number] = digest_of(view, algorithm)
        return digest

    def _recall(self, view: BlockView, algorithm: str) -> bytes:
        """The digest that a verified pull computed, so that only the hashing itself is left out."""
        known = self._digests.get(view.number)
        return self._hash(view, algorithm) if known is None else known


def measured(work: Callable[[], dict[str, Any] | None], pids: list[int]) -> dict[str, Any]:
    """Seconds that `work` takes, and its result."""
    cpu, began = cpu_seconds(pids), time.perf_counter()
    extra = work()
    seconds = time.perf_counter() - began
    line = {"seconds": round(seconds, 5), "cpu_seconds": round(cpu_seconds(pids) - cpu, 3), **(extra or {})}
    if "phases" in line:
        after = line["phases"]["transfer"] + line["phases"]["finalize"]
        line["before_first_request"] = round(seconds - after, 5)
        line["beside_transfer"] = round(seconds - line["phases"]["transfer"], 5)
    return line


def summary(case: str, results: Mapping[str, list[dict[str, Any]]], against: list[str], nbytes: int) -> dict[str, Any]:
    """Medians of one case, and of its ratios to other cases of the same round."""
    own = results[case]
    line: dict[str, Any] = {
        "summary": case,
        "median_seconds": round(statistics.median(one["seconds"] for one in own), 5),
        "GB_per_s": round(nbytes / 1e9 / statistics.median(one["seconds"] for one in own), 2),
        "cpu_s_per_GB": round(statistics.median(one["cpu_seconds"] for one in own) / (nbytes / 1e9), 3),
    }
    for key in ("before_first_request", "beside_transfer"):
        if key in own[0]:
            line[f"median_{key}"] = round(statistics.median(one[key] for one in own), 5)
    if "phases" in own[0]:
        line["median_phases"] = {
            phase: round(statistics.median(one["phases"][phase] for one in own), 4) for phase in own[0]["phases"]
        }
    for other in against:
        pairs = list(zip(results[other], own, strict=True))
        line[f"times_as_fast_as_{other}"] = round(statistics.median(a["seconds"] / b["seconds"] for a, b in pairs), 3)
        if all(a["cpu_seconds"] for a, _ in pairs):
            line[f"cpu_of_{other}"] = round(statistics.median(b["cpu_seconds"] / a["cpu_seconds"] for a, b in pairs), 3)
    return line


def arguments_given() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="llama")
    parser.add_argument("--case", action="append", help="may be given several times; default: plain, gloo, tcp, shm")
    parser.add_argument("--against", action="append", help="cases to give ratios to; default: plain, if it is there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--device", default="cpu", help="where the tensors of both ends live; an accelerator has `tcp`")
    args = parser.parse_args()
    args.case = args.case or (["plain", "gloo", "tcp", "shm"] if args.device == "cpu" else ["tcp"])
    if args.device != "cpu" and set(args.case) & {"plain", *RAW_CASES}:
        parser.error("plain and raw cases move memory of the CPU only")
    return args


def main() -> None:
    """Measure, and print JSON lines."""
    args = arguments_given()
    cases: list[str] = args.case
    against: list[str] = args.against or [case for case in cases if case == "plain"]
    tensors = make(args.workload, args.scale, fill=False, device=args.device)
    nbytes = sum(t.nbytes for t in tensors.values())
    transports = sorted({case.removesuffix(UNVERIFIED) for case in cases if case not in {"plain", *RAW_CASES}})
    arguments = [args.workload, "--scale", str(args.scale)]
    with ExitStack() as stack:
        works: dict[str, Callable[[], dict[str, Any] | None]] = {}
        pids: list[int] = []

        def start(module: str, *more: str) -> dict[str, Any]:
            process, ready = stack.enter_context(server(module, *more))
            pids.append(process.pid)
            return ready

        if "plain" in cases:
            port = start("benchmarks.peers", "plain", *arguments)["port"]
            works["plain"] = lambda: pull_plain(port, tensors)
        if transports:
            ready = start(
                "benchmarks.peers",
                "netloader",
                *arguments,
                "--device",
                args.device,
                "--transport",
                ",".join(transports),
            )
            pulls = NetloaderPulls(ready["port"], tensors)
        if set(cases) & set(RAW_CASES):
            raw = RawCases(start("benchmarks.raw", *arguments), tensors)
        for case in cases:
            if case in RAW_CASES:
                works[case] = lambda case=case: raw.run(case)
            elif case != "plain":
                works[case] = lambda case=case: pulls.run(case)
        results: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
        for round_number in range(args.rounds + 1):
            for case in cases:
                result = measured(works[case], pids)
                line = {"case": case, "workload": args.workload, "round": round_number, **result}
                print(json.dumps(line), flush=True)
                if round_number:
                    results[case].append(result)
        for case in cases:
            line = {"workload": args.workload, "bytes": nbytes, **summary(case, results, against, nbytes)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
