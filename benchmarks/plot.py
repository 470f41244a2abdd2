"""Draws the measurements: ``python -m benchmarks.plot [--from LINES.jsonl] [--to PICTURE.svg]``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.goals import Measured, read
from benchmarks.suite import OUT

_PULLS = ("plain", "gloo", "tcp", "shm", "raw_tcp_1", "raw_tcp_2", "raw_tcp_bounded_2", "read_memory_2", "memcpy_2")
_NAMES = {
    "plain": "one send and wait\nfor each tensor (gloo)",
    "raw_tcp_1": "raw TCP loop",
    "raw_tcp_2": "raw TCP loop, 2 streams",
    "raw_tcp_bounded_2": "the same with little room",
    "read_memory_2": "reading the memory, 2 threads",
    "memcpy_2": "copying in memory, 2 threads",
}
_OURS, _OTHERS = "#1f6f8b", "#b8b8b8"


def draw_pulls(axes: Any, found: Measured) -> None:
    """Speed of one pull of the Llama-shaped workload, relative to the plain gloo loop."""
    pairs = [(case, found.ratio("llama", case, "times_as_fast_as_plain")) for case in reversed(_PULLS)]
    known = [(case, ratio) for case, ratio in pairs if ratio is not None]
    colours = [_OURS if case in {"gloo", "tcp", "shm"} else _OTHERS for case, _ in known]
    bars = axes.barh(
        [_NAMES.get(case, f"netloader, {case}") for case, _ in known], [r for _, r in known], color=colours
    )
    axes.bar_label(bars, fmt="%.1f x", padding=3)
    axes.set_title("One pull, 1.24 GB in 226 tensors, every block verified")
    axes.set_xlabel("times as fast as the plain gloo loop")
    axes.margins(x=0.15)


def draw_fan_out(axes: Any, found: Measured) -> None:
    """Seconds until the last of several clients is done."""
    for mode, marker in (("serial", "s"), ("concurrent", "^"), ("relays", "o")):
        points = sorted((clients, line["seconds"]) for (clients, m), line in found.fan_out.items() if m == mode)
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, label={"relays": "netloader, relays"}.get(mode, mode))
    axes.set_title("Many clients, one seed, every link shaped to 100 Mbit/s")
    axes.set_xlabel("clients")
    axes.set_ylabel("seconds until the last one has all")
    axes.set_ylim(bottom=0)
    axes.legend()


def main() -> None:
    """Draw."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "netloader"  # equal measurements give an equal file
    from matplotlib import pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, default=OUT)
    parser.add_argument("--to", type=Path, default=Path("docs/images/benchmarks.svg"))
    args = parser.parse_args()
    found = read(args.source)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    draw_pulls(left, found)
    draw_fan_out(right, found)
    args.to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.to, metadata={"Date": None})


if __name__ == "__main__":
    main()
