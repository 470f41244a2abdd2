"""One engine's worth of a library client, in a process: `python -m tests.discovery.origin_main URL FILE READS MOMENT`.

It fills its tensors from a source, or loads them from FILE as the origin. Each reading appends a line to READS. At
MOMENT ("before", "after" or "") the origin kills itself. It prints what it did, and serves until its input ends.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import torch
from safetensors.torch import load_file, save_file

import netloader

IDENTITY = netloader.ModelIdentity(model="m", architecture="A", dtype="float32")
SHAPE = (256, 1024)


def make(file: Path) -> None:
    """Write the weights."""
    made = torch.Generator().manual_seed(1)
    save_file({f"w{n}": torch.randn(SHAPE, generator=made) for n in range(4)}, file)


async def main(*arguments: str) -> None:
    url, file, reads, moment = arguments
    tensors = {f"w{n}": torch.zeros(SHAPE) for n in range(4)}

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def load(tell: Callable[[str], None]) -> None:
        if moment == "before":
            die()
        with Path(reads).open("a", encoding="ascii") as file_of_reads:
            file_of_reads.write(f"{os.getpid()}\n")
        tell("reading")
        for name, tensor in load_file(file).items():
            tensors[name].copy_(tensor)
        if moment == "after":
            die()

    async with netloader.Server(host="127.0.0.1", discovery=url) as server:
        report = await netloader.pull_or_load(
            tensors, IDENTITY, load, server=server, discovery=url, wait=300, timeout=300
        )
        stored = load_file(file)
        exact = all(torch.equal(tensors[name], stored[name]) for name in stored)
        print("loaded" if report is None else "pulled", "exact" if exact else "WRONG", flush=True)
        if moment == "serving" and report is None:
            die()
        await anyio.to_thread.run_sync(sys.stdin.read)


if __name__ == "__main__":
    anyio.run(main, *sys.argv[1:])
