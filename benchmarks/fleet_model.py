"""A fleet of replicas that pull from each other, simulated over the decisions of real pulls. No sockets, no clock.

Usage: ``python -m benchmarks.fleet_model [--replicas 1000] [--blocks 256] [--only NAME]``

Each replica is a :class:`~netloader.core.pull.Pull`, the state machine that decides in the product.
`benchmarks.fleet_simulation` stands for everything around it: links, servers, and the registry in which replicas find
each other. A run is deterministic.
Times are printed in *links' times*: one is the time that one link takes for the whole model.

Bounds, with N replicas, B blocks, and links that carry one block per block time in each direction:

- One chain of N hops takes B + N block times, or 1.26 links' times for 1,000 hops and 3,829 blocks.
- No order of blocks takes less than B + ceil(log2 N) block times: every replica has to receive B blocks, and the number
  of replicas that have any given block at most doubles in a block time. For 1,000 replicas and 3,829 blocks that is
  1.003 links' times, for 256 blocks 1.04.
- Where connections point only from older to newer replicas, the second bound is out of reach: at full rate, the first n
  replicas together pass on one link's worth, so they form a chain, however many parents each one has. So replicas have
  to pull from newer ones too, and a block may be asked for only where it is.
- A zone in which nobody holds the model has to be entered by each block once.
- With HCCL, a device moves one window at a time, in or out. Every replica but the last one has to receive the model and
  to send it on, so that two links' times are the least.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.fleet_simulation import Scenario, simulate

__all__ = ["SCENARIOS"]

SCENARIOS: dict[str, Scenario] = {
    "at once, one seed": Scenario(),
    "three seeds, two zones": Scenario(seeds=(0, 0, 1), zones=2),
    "one seed, two zones": Scenario(zones=2),
    "joining over a minute": Scenario(joining=60.0),
    "1 % die": Scenario(dying=0.01, lost=0.001),
    "one window at a time": Scenario(one_window=True),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the scenarios, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=256)
    parser.add_argument("--only", action="append", choices=list(SCENARIOS))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the scenario")
    args = parser.parse_args(arguments)
    changes = {name: json.loads(value) for name, _, value in (one.partition("=") for one in args.set)}
    titles = ("scenario", "last", "longest", "median", "from seeds", "between zones", "depth", "mean", "sessions")
    print(f"| {' | '.join((*titles, 'done, died, failed', 'CPU s'))} |")
    print("| --- |" + " --- |" * 10)
    for name in args.only or SCENARIOS:
        began = time.process_time()
        found = simulate(replace(SCENARIOS[name], replicas=args.replicas, blocks=args.blocks, **changes))
        took = time.process_time() - began
        print(
            f"| {name} | {found.last:.2f} | {found.longest:.2f} | {found.median:.2f} | {found.from_seeds:.2f} | "
            f"{found.between_zones:.2f} | {found.depth} | {found.mean_depth:.1f} | {found.connects:.1f} | "
            f"{found.done}, {found.died}, {found.failed} | {took:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
