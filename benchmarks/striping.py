"""One client with a fast link pulls from one, two and three servers with slower links.

Usage (as root): ``python -m benchmarks.striping [--sources 3] [--mbit 100] [--seconds 20]``

Each server's link carries the model in ``--seconds``. The client's link is as fast as all of theirs together. Prints
one JSON line for each number of servers, with the ratio to one server.
"""

from __future__ import annotations

import argparse
import json

from benchmarks.fleet import replicas
from benchmarks.hosts import hosts
from benchmarks.workloads import GIB


def main() -> None:
    """Measure, and print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, default=3)
    parser.add_argument("--mbit", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--transport", default="tcp")
    args = parser.parse_args()
    nbytes = args.mbit * 125_000 * args.seconds
    settings = ["--workload", "one", "--scale", str(nbytes / GIB), "--transport", args.transport]
    with hosts([args.mbit] * args.sources + [args.mbit * args.sources]) as made:
        alone = 0.0
        for count in range(1, args.sources + 1):
            with replicas([*made[:count], made[-1]], *settings) as (*seeds, client):
                for seed in seeds:
                    seed.order(serve=True)
                truths = {seed.hear("serving")["fingerprint"] for seed in seeds}
                client.order(pull=[seed.address for seed in seeds], relay=False)
                result = client.hear("seconds")
                client.order(fingerprint=True)
                if "error" in result or {client.hear("fingerprint")["fingerprint"]} != truths:
                    raise SystemExit(f"the client did not get the servers' bytes: {result}")
            alone = alone or result["seconds"]
            line = {
                "sources": count,
                "seconds": round(result["seconds"], 2),
                "times_one": round(alone / result["seconds"], 2),
                "shares": [round(result["sources"].get(seed.address, 0) / nbytes, 3) for seed in seeds],
                "bytes": int(nbytes),
                "mbit": args.mbit,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
