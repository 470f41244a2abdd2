"""Many replicas of one server, on hosts with shaped links: one after the other, all at once, and with relays.

Usage (as root): ``python -m benchmarks.fan_out [--clients 8] [--mbit 100] [--seconds 20] [--mode serial ...]``

Modes: ``serial`` (one client after the other), ``concurrent`` (all at once, no relays), ``relays`` (all at once, the
default behaviour), ``killed`` (as relays, and the relay in the middle of the chain is killed with SIGKILL when all are
half-way). The model is as large as one link carries in ``--seconds``. Every client compares a SHA-256 over all bytes
with the server's. Prints one JSON line for each mode: seconds until the last client was done, and the ratio to serial.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from benchmarks.fleet import Replica, replicas
from benchmarks.hosts import hosts
from benchmarks.workloads import GIB


def in_the_middle(seed: Replica, halfway: dict[Replica, dict[str, Any]]) -> Replica:
    """The client in the middle of the chain; each client reports where it pulls from."""
    behind = {said["source"]: client for client, said in halfway.items()}
    chain: list[Replica] = []
    address = seed.address
    while address in behind and behind[address] not in chain:
        chain.append(behind[address])
        address = chain[-1].address
    return chain[len(chain) // 2]


def run_mode(mode: str, seed: Replica, truth: str, clients: list[Replica]) -> dict[str, Any]:
    """Run one mode, from the first call until the last client is done."""
    relay = mode in ("relays", "killed")
    began = time.monotonic()
    results: list[dict[str, Any]] = []
    living = list(clients)
    if mode == "serial":
        for client in clients:
            client.order(pull=[seed.address], relay=False)
            results.append(client.hear("seconds"))
    else:
        for client in clients:
            client.order(pull=[seed.address], relay=relay)
        if mode == "killed":
            victim = in_the_middle(seed, {client: client.hear("half") for client in clients})
            victim.kill()
            living.remove(victim)
        results = [client.hear("seconds") for client in living]
    failed = [result for result in results if "error" in result]
    if failed:
        raise SystemExit(f"{mode}: {len(failed)} clients failed: {failed[0]}")
    seconds = max(result["done"] for result in results) - began
    for client in living:
        client.order(fingerprint=True)
    if {client.hear("fingerprint")["fingerprint"] for client in living} != {truth}:
        raise SystemExit(f"{mode}: not every client has the server's bytes")
    return {
        "mode": mode,
        "clients": len(results),
        "seconds": round(seconds, 2),
        "slowest": round(max(result["seconds"] for result in results), 2),
        "retries": sum(result["retries"] for result in results),
        "from_the_seed": sum(result["sources"].get(seed.address, 0) for result in results),
    }


def main() -> None:
    """Measure, and print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--mbit", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--transport", default="tcp")
    parser.add_argument("--mode", action="append", choices=["serial", "concurrent", "relays", "killed"])
    args = parser.parse_args()
    nbytes = args.mbit * 125_000 * args.seconds
    settings = ["--workload", "one", "--scale", str(nbytes / GIB), "--transport", args.transport]
    done: dict[str, float] = {}
    with hosts([args.mbit] * (args.clients + 1)) as made:
        for mode in args.mode or ["serial", "concurrent", "relays", "killed"]:
            with replicas(made, *settings) as (seed, *clients):
                seed.order(serve=True)
                truth = seed.hear("serving")["fingerprint"]
                result = run_mode(mode, seed, truth, clients)
            done[mode] = result["seconds"]
            if "serial" in done:
                result["times_serial"] = round(done["serial"] / result["seconds"], 2)
            if mode == "killed" and "relays" in done:
                result["of_undisturbed"] = round(result["seconds"] / done["relays"], 2)
            print(json.dumps({**result, "bytes": int(nbytes), "mbit": args.mbit}), flush=True)


if __name__ == "__main__":
    main()
