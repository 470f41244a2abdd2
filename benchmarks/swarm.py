"""Replicas that find each other and pull from each other, on hosts with shaped links, and what the model predicts.

Usage (as root): ``python -m benchmarks.swarm [--clients 8] [--mbit 100] [--seconds 20] [--rounds 3] [--predict]``

All replicas begin at once. They find each other in a folder, as `benchmarks.replica` says. Every client compares a
SHA-256 over all bytes with the server's. Prints one JSON line for each round: seconds until the last client was done.
``--predict`` prints only what `benchmarks.fleet_model` says for the same fleet.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from benchmarks.fleet import replicas
from benchmarks.fleet_simulation import Scenario, simulate
from benchmarks.hosts import hosts
from benchmarks.workloads import GIB
from netloader.core.plan import block_bytes_for


def predicted(clients: int, nbytes: int, seconds: float, **measured: float) -> float:
    """Seconds until the last client is done, as the model says: the median of five fleets.

    Args:
        clients: Replicas.
        nbytes: Size of the model.
        seconds: What one link takes for it, measured with one client.
        measured: Fields of the scenario.
    """
    blocks = max(1, nbytes // block_bytes_for(nbytes))
    found = [
        simulate(Scenario(clients, blocks, seconds, known=clients, seed=seed, **measured)).last  # type: ignore[arg-type]
        for seed in range(5)
    ]
    return sorted(found)[2] * seconds


def measured(clients: int, mbit: int, nbytes: int) -> float:
    """Seconds until the last of `clients` replicas on hosts of their own has every byte."""
    settings = ["--workload", "one", "--scale", str(nbytes / GIB), "--transport", "tcp"]
    with (
        tempfile.TemporaryDirectory() as registry,
        hosts([mbit] * (clients + 1)) as made,
        replicas(made, *settings) as (seed, *others),
    ):
        seed.order(serve=True)
        truth = seed.hear("serving")["fingerprint"]
        (Path(registry) / seed.address).touch()
        began = time.monotonic()
        for one in others:
            one.order(pull=[], relay=True, registry=registry, host=one.host.address)
        results = [one.hear("seconds") for one in others]
        failed = [result for result in results if "error" in result]
        if failed:
            raise SystemExit(f"{len(failed)} clients failed: {failed[0]}")
        for one in others:
            one.order(fingerprint=True)
        if {one.hear("fingerprint")["fingerprint"] for one in others} != {truth}:
            raise SystemExit("not every client has the server's bytes")
        return max(float(result["done"]) for result in results) - began


def main() -> None:
    """Measure or predict, and print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--mbit", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--link", type=float, help="seconds that one client took, for the prediction")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the scenario")
    args = parser.parse_args()
    nbytes = int(args.mbit * 125_000 * args.seconds)
    if args.predict:
        changes = {name: float(value) for name, _, value in (one.partition("=") for one in args.set)}
        found = predicted(args.clients, nbytes, args.link or args.seconds, **changes)
        print(json.dumps({"clients": args.clients, "predicted": round(found, 2)}))
        return
    for number in range(args.rounds):
        found = measured(args.clients, args.mbit, nbytes)
        print(json.dumps({"clients": args.clients, "round": number, "seconds": round(found, 2)}), flush=True)


if __name__ == "__main__":
    main()
