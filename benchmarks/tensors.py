"""Cost of handling tensors: digests in GB/s; describing, planning and viewing many small tensors in ms.

Usage: ``python -m benchmarks.tensors [--rounds 7] [--gib 1] [--count 20000]``

Prints one JSON line for each measurement: median and best of all rounds, which are interleaved. Digests are taken over
one touched tensor, in blocks of 4 MiB. Algorithms that are not installed are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import statistics
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import xxhash

from benchmarks.workloads import make
from netloader.codecs.packed import pack, staging_bytes, staging_for, unpack
from netloader.core.identity import ModelIdentity
from netloader.core.plan import DEFAULT_BLOCK_BYTES, make_plan
from netloader.tensors import describe, destination, digest_of, hold

Case = tuple[str, Callable[[], Any]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gib", type=float, default=1)
    parser.add_argument("--count", type=int, default=20_000)
    options = parser.parse_args()
    digests(options.gib, options.rounds)
    edge(options.count, options.rounds)


def digests(gib: float, rounds: int) -> None:
    """Rates of possible block digests, with one thread and with two."""
    memory = torch.zeros(int(gib * (1 << 30)), dtype=torch.uint8).random_().numpy().data
    blocks = [memory[at : at + DEFAULT_BLOCK_BYTES] for at in range(0, len(memory), DEFAULT_BLOCK_BYTES)]
    cases = [
        (f"{name} x{threads}", run_in_threads(threads, blocks, digest))
        for name, digest in algorithms()
        for threads in (1, 2)
    ]
    for name, seconds in interleaved(cases, min(rounds, 3)):
        median, best = statistics.median(seconds), min(seconds)
        rates = {"gb_per_s": round(len(memory) / 1e9 / median, 2), "best": round(len(memory) / 1e9 / best, 2)}
        print(json.dumps({"benchmark": "digest", "case": name, **rates}), flush=True)


def algorithms() -> Iterator[tuple[str, Callable[[memoryview], object]]]:
    """Name and function of each algorithm."""
    yield "xxh3-128", xxhash.xxh3_128_digest
    yield "xxh3-64", xxhash.xxh3_64_digest
    yield "crc32 (zlib)", zlib.crc32
    yield "sha256", lambda block: hashlib.sha256(block).digest()
    yield "blake2b-128", lambda block: hashlib.blake2b(block, digest_size=16).digest()
    if importlib.util.find_spec("blake3") is not None:
        blake3 = importlib.import_module("blake3").blake3
        yield "blake3", lambda block: blake3(block).digest()


def run_in_threads(
    threads: int, blocks: Sequence[memoryview], digest: Callable[[memoryview], object]
) -> Callable[[], None]:
    """A function that digests all blocks, divided among the threads."""

    def share(first: int) -> None:
        for block in blocks[first::threads]:
            digest(block)

    def run() -> None:
        helpers = [threading.Thread(target=share, args=(first,)) for first in range(1, threads)]
        for helper in helpers:
            helper.start()
        share(0)
        for helper in helpers:
            helper.join()

    return run


def edge(count: int, rounds: int) -> None:
    """Time of every step between tensors and blocks."""
    source = make("small", count / 20_000, fill=True)
    target = make("small", count / 20_000, fill=False)
    manifest, memory = describe(source)
    plan = make_plan(manifest, DEFAULT_BLOCK_BYTES)
    filled = destination(target)
    numbers = range(len(plan.blocks))
    ready = memory.views(plan, numbers)
    staging = staging_for(staging_bytes(ready), "cpu")

    def adopt() -> None:
        destination(None).adopt(manifest)

    def through_staging() -> None:
        for here, there in zip(ready, filled.views(plan, numbers), strict=True):
            unpack(pack(here, staging), there)

    cases: list[Case] = [
        ("describe", lambda: describe(source)),
        ("plan", lambda: make_plan(manifest, DEFAULT_BLOCK_BYTES)),
        ("views", lambda: memory.views(plan, numbers)),
        ("views and buffers", lambda: [view.buffers() for view in memory.views(plan, numbers)]),
        ("views and regions", lambda: [view.regions() for view in memory.views(plan, numbers)]),
        ("views and tensors", lambda: [view.tensors() for view in memory.views(plan, numbers)]),
        ("digest", lambda: [digest_of(view, "xxh3-128") for view in ready]),
        ("pack and unpack", through_staging),
        ("hold", lambda: hold(source, ModelIdentity())),
        ("destination over tensors", lambda: destination(target)),
        ("destination adopts", adopt),
    ]

    for name, seconds in interleaved(cases, rounds):
        times = {"ms": round(statistics.median(seconds) * 1e3, 1), "best": round(min(seconds) * 1e3, 1)}
        print(json.dumps({"benchmark": f"edge, {count} tensors of 4 KiB", "case": name, **times}), flush=True)


def interleaved(cases: Sequence[Case], rounds: int) -> Iterator[tuple[str, list[float]]]:
    """Run all cases in rotation, `rounds` times; yield each case's seconds."""
    seconds: dict[str, list[float]] = {name: [] for name, _ in cases}
    for _ in range(rounds):
        for name, run in cases:
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    yield from seconds.items()


if __name__ == "__main__":
    main()
