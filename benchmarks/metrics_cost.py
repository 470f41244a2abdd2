"""What metrics cost: the processor time of counting the events of a pull, in relation to the pull.

The events of a real pull are recorded at both sides, then counted again many times. So noise of the machine does not
hide a cost that is far below it.

    python -m benchmarks.metrics_cost [--megabytes 1024]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from prometheus_client import CollectorRegistry

from netloader import sync
from netloader.observe import Event
from netloader.observe.metrics import Metrics

_TENSORS = 64
_REPEATS = 200


def main() -> None:
    """Measure, and print a line for each side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the pull (1024)")
    parser.add_argument("--transport", default="tcp", help="tcp, shm or gloo (tcp)")
    options = parser.parse_args()
    rows = options.megabytes * (1 << 20) // _TENSORS // 4096
    weights = {f"layer.{n}": torch.ones(rows, 1024) for n in range(_TENSORS)}
    into = {name: torch.empty_like(tensor) for name, tensor in weights.items()}
    ours: list[Event] = []
    theirs: list[Event] = []
    with sync.serve(weights, host="127.0.0.1", transport=options.transport, observers=[theirs.append]) as server:
        report = sync.pull(into, sources=[server.address], transport=options.transport, observers=[ours.append])
    for side, events in (("client", ours), ("server", theirs)):
        cost = _seconds(events)
        print(
            f"{side}: {len(events)} events cost {cost * 1e3:.3f} ms, {cost / len(events) * 1e6:.1f} us each: "
            f"{cost / report.seconds:.4%} of a pull of {report.nbytes / 1e6:.0f} MB in {report.seconds:.2f} s"
        )


def _seconds(events: list[Event]) -> float:
    """Median of the seconds that counting all of `events` takes."""
    metrics, took = Metrics(CollectorRegistry()), []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        for event in events:
            metrics(event)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


if __name__ == "__main__":
    main()
