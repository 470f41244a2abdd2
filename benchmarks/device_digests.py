"""Speed of several ways to compute digests of device memory, in GB/s.

Usage: ``python -m benchmarks.device_digests [--device cuda:0] [--gib 1] [--rounds 5] [--threads 1]``

Ways: ``digest_of``, which netloader uses; the same hash over copies through ``plain`` or ``pinned`` staging memory;
``ahead``: pinned, with the next piece copied while one is hashed; ``sums``: two weighted sums of 64-bit words, computed
on the device. The sums are not a reliable digest (two flipped top bits cancel out). They show what a device could
reach. ``sums on the CPU`` is their cost for a seed whose weights are in host memory.

Prints one JSON line for each way: median and best of interleaved rounds, over blocks of 4 MiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import xxhash

from netloader.core.plan import DEFAULT_BLOCK_BYTES
from netloader.errors import TransportUnavailable
from netloader.tensors import digest_of
from netloader.transports.conformance import TensorBlockView

Way = Callable[[torch.Tensor], object]
MIB = 1 << 20


class Block(TensorBlockView):
    """A contiguous block on a device."""

    def __init__(self, span: torch.Tensor) -> None:
        super().__init__(0, [])
        self._spans = [span]

    def buffers(self) -> Sequence[memoryview]:
        """Not possible."""
        raise TransportUnavailable("the memory is not the CPU's")


def through(nbytes: int, span: torch.Tensor, *, pinned: bool) -> bytes:
    """Copy a piece, hash it, then the next one."""
    state = xxhash.xxh3_128()
    stage = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
    for start in range(0, span.numel(), nbytes):
        part = span[start : start + nbytes]
        stage[: part.numel()].copy_(part)
        state.update(stage[: part.numel()].numpy().data)
    return state.digest()


def ahead(nbytes: int, span: torch.Tensor) -> bytes:
    """Copy a piece while the previous one is hashed."""
    state = xxhash.xxh3_128()
    stages = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    module = torch.get_device_module(span.device)
    events = [module.Event() for _ in range(2)]
    starts = range(0, span.numel(), nbytes)

    def copy(place: int) -> None:
        part = span[starts[place] : starts[place] + nbytes]
        stages[place % 2][: part.numel()].copy_(part, non_blocking=True)
        events[place % 2].record()

    copy(0)
    for place in range(len(starts)):
        if place + 1 < len(starts):
            copy(place + 1)
        events[place % 2].synchronize()
        state.update(stages[place % 2][: span.numel() - starts[place]].numpy().data)
    return state.digest()


def sums(weights: Sequence[torch.Tensor], span: torch.Tensor) -> list[int]:
    """Two weighted sums, modulo 2 to the 64th."""
    words = span.view(torch.int64)
    return torch.stack([(words * weight[: words.numel()]).sum() for weight in weights]).tolist()


def in_threads(count: int, way: Way, blocks: Sequence[torch.Tensor]) -> None:
    """Divide the blocks among the threads."""

    def work(number: int) -> None:
        for block in blocks[number::count]:
            way(block)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--gib", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    memory = torch.randint(0, 256, (int(args.gib * 1024) * MIB,), dtype=torch.uint8)
    weights = [torch.randint(-(1 << 62), 1 << 62, (DEFAULT_BLOCK_BYTES // 8,)) | 1 for _ in range(2)]
    there = memory.to(args.device)
    there_weights = [weight.to(args.device) for weight in weights]
    ways: dict[str, tuple[torch.Tensor, Way]] = {
        "digest_of": (there, lambda span: digest_of(Block(span), "xxh3-128")),
        **{f"plain {n} MiB": (there, partial(through, n * MIB, pinned=False)) for n in (1, 4)},
        **{f"pinned {n} MiB": (there, partial(through, n * MIB, pinned=True)) for n in (1, 4)},
        **{f"ahead {n} MiB": (there, partial(ahead, n * MIB)) for n in (1, 2)},
        "sums": (there, partial(sums, there_weights)),
        "sums on the CPU": (memory[: memory.numel() // 4], partial(sums, weights)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):
        for name, (where, way) in ways.items():
            blocks = [where[at : at + DEFAULT_BLOCK_BYTES] for at in range(0, where.numel(), DEFAULT_BLOCK_BYTES)]
            began = time.perf_counter()
            in_threads(args.threads, way, blocks)
            if number:
                seconds[name].append((time.perf_counter() - began) / where.numel() * 1e9)
    for name, found in seconds.items():
        rates = {"gb_per_s": round(1 / statistics.median(found), 2), "best": round(1 / min(found), 2)}
        print(json.dumps({"benchmark": "device_digest", "way": name, "threads": args.threads, **rates}), flush=True)


if __name__ == "__main__":
    main()
