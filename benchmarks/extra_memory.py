"""Memory that a pull needs beyond its destination: one new process for each transport.

Usage: ``python -m benchmarks.extra_memory [--workload llama] [--transport tcp --transport shm ...] [--scale 1]``

Prints one JSON line for each transport: the growth of the client's peak resident memory from before the call (with the
destination allocated and touched) to after it, and that of the server during the first session it serves, in MiB. The
client has pulled a tiny model the same way before, so what is loaded only once (modules, thread stacks) is not counted
as memory of the session; ``with_first_use`` counts it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import netloader
from benchmarks.single_pull import server
from benchmarks.workloads import WORKLOADS, make

MIB = 1 << 20


def resident(pid: int | str, field: str) -> int:
    """A field of a process's status (``VmRSS``, ``VmHWM``), in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no {field}")


def forget_peak(pid: int | str) -> None:
    """Reset the peak to the memory that is resident now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", "ascii")


def pull(workload: str, scale: float, transport: str, server_pid: int, ports: list[int]) -> dict[str, float]:
    """Pull once in this process, after a tiny pull from another server if one is given."""
    into = make(workload, scale, fill=False)
    before = resident("self", "VmRSS")
    if len(ports) > 1:
        tiny = make("one", 1e-4, fill=False)
        identity = netloader.ModelIdentity(model="bench")
        netloader.sync.pull(tiny, identity, sources=[f"127.0.0.1:{ports[1]}"], transport=transport)
    warm = resident("self", "VmRSS")
    forget_peak("self")
    forget_peak(server_pid)
    there = resident(server_pid, "VmRSS")
    identity = netloader.ModelIdentity(model="bench")
    netloader.sync.pull(into, identity, sources=[f"127.0.0.1:{ports[0]}"], transport=transport)
    peak = resident("self", "VmHWM")
    return {
        "client_MiB": round((peak - warm) / MIB, 1),
        "client_with_first_use_MiB": round((peak - before) / MIB, 1),
        "server_MiB": round((resident(server_pid, "VmHWM") - there) / MIB, 1),
    }


def main() -> None:
    """Measure, and print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="llama")
    parser.add_argument("--transport", action="append", help="may be given several times; default: gloo, tcp, shm")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        pid, *ports = [int(part) for part in args.client.split(",")]
        print(json.dumps(pull(args.workload, args.scale, args.transport[0], pid, ports)))
        return
    for transport in args.transport or ["gloo", "tcp", "shm"]:
        own = ["netloader", args.workload, "--scale", str(args.scale), "--transport", transport]
        tiny = ["netloader", "one", "--scale", "1e-4", "--transport", transport]
        with server("benchmarks.peers", *own) as (process, ready), server("benchmarks.peers", *tiny) as (_, small):
            client = [sys.executable, "-m", "benchmarks.extra_memory", "--workload", args.workload]
            client += ["--scale", str(args.scale), "--transport", transport]
            client += ["--client", f"{process.pid},{ready['port']},{small['port']}"]
            done = subprocess.run(client, check=True, capture_output=True, text=True)
        line = {"workload": args.workload, "transport": transport, **json.loads(done.stdout)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
