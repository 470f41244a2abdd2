"""A pull during a flood of stray connections to the server's port, compared with an undisturbed pull.

Usage: ``python -m benchmarks.garbage [--megabytes 1000] [--rounds 3] [--transport gloo]``

Server, client and traffic are separate processes. The traffic is that of the tests (10,000 random and mutated frames,
200 silent connections, 200 resets), repeated as long as the pulls run. Prints one JSON line for each pull and one with
the medians and their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import netloader
from tests.drivers import garbage

IDENTITY = netloader.ModelIdentity(model="garbage")


def weights(megabytes: int) -> dict[str, torch.Tensor]:
    """Tensors of 16 MB, with contents that are cheap to make and differ."""
    made = {}
    for number in range(max(1, megabytes // 16)):
        tensor = torch.arange(4_000_000, dtype=torch.int32)
        made[f"layer.{number}"] = tensor.add_(number)
    return made


def serve(megabytes: int, transport: str) -> None:
    """Serve until stdin closes."""
    with netloader.sync.serve(weights(megabytes), IDENTITY, host="127.0.0.1", transport=transport) as server:
        print(server.port, flush=True)
        sys.stdin.read()


def talk(port: int) -> None:
    """Send random and mutated frames until a signal says stop."""
    seed = 0
    while True:
        made = garbage.round_of(port, garbage.Amount(), seed)
        print(json.dumps({"round": seed, "connections": made}), flush=True)
        seed += 1


@contextmanager
def process(*args: str) -> Iterator[subprocess.Popen[str]]:
    """Start this script in another role."""
    command = [sys.executable, "-m", "benchmarks.garbage", *args]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def pulls(port: int, into: dict[str, torch.Tensor], transport: str, rounds: int, kind: str) -> list[float]:
    """Seconds of `rounds` pulls. Each pull verifies all blocks, and its root is compared with the source's."""
    took = []
    for number in range(rounds):
        report = netloader.sync.pull(into, IDENTITY, sources=[f"127.0.0.1:{port}"], transport=transport)
        took.append(report.seconds)
        print(json.dumps({"kind": kind, "pull": number, "seconds": round(report.seconds, 3), "root": report.root}))
    return took


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transport", default="gloo")
    parser.add_argument("--role", choices=["measure", "serve", "talk"], default="measure", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "serve":
        serve(options.megabytes, options.transport)
        return
    if options.role == "talk":
        talk(options.port)
        return
    into = weights(options.megabytes)
    with process("--role", "serve", "--megabytes", str(options.megabytes), "--transport", options.transport) as server:
        if server.stdout is None:
            raise RuntimeError("the server process has no stdout")
        port = int(server.stdout.readline())
        quiet = pulls(port, into, options.transport, options.rounds, "quiet")
        with process("--role", "talk", "--port", str(port)):
            time.sleep(2.0)  # until it sends
            noisy = pulls(port, into, options.transport, options.rounds, "garbage")
    calm, loud = statistics.median(quiet), statistics.median(noisy)
    print(json.dumps({"quiet": round(calm, 3), "garbage": round(loud, 3), "ratio": round(loud / calm, 2)}))


if __name__ == "__main__":
    main()
