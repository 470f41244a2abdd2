"""One replica in its own process. It reads commands as JSON lines on standard input and answers the same way.

``{"registry": folder, "host": address}`` in the latter lets it find others, and others find it, in that folder.

``{"serve": true}`` makes it a server with filled tensors. ``{"pull": [sources], "relay": bool}`` makes it pull, as a
relay or not. ``{"fingerprint": true}`` asks for a digest over all its bytes. It ends when its standard input closes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import anyio
import torch

import netloader
from benchmarks.workloads import make
from netloader.core.addresses import parse_address
from netloader.discovery.base import Appeared, Listed, SourceChange

IDENTITY = netloader.ModelIdentity(model="bench")


class Folder:
    """Finds the replicas that have a file in a folder, named after their addresses, in an order of this replica's own.

    Args:
        path: The folder.
        own: Address of this replica, which is left out.
    """

    def __init__(self, path: Path, own: str) -> None:
        self._path = path
        self._own = own

    async def watch(self) -> AsyncGenerator[SourceChange, None]:
        """Look again ten times a second."""
        known = {self._own}
        while True:
            found = {file.name for file in self._path.iterdir()} - known
            known |= found
            for name in sorted(found, key=lambda name: hashlib.sha256(f"{self._own} {name}".encode()).digest()):
                yield Appeared(netloader.Source(parse_address(name)))
            if len(known) > 1:
                yield Listed()
            await anyio.sleep(0.1)


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over all bytes, independent of blocks and roots."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def say(**fields: Any) -> None:
    """Print one JSON line."""
    print(json.dumps(fields), flush=True)


async def run(args: argparse.Namespace) -> None:
    """Carry out the commands on standard input."""
    tensors = make(args.workload, args.scale, fill=False)
    async with netloader.Server(transport=args.transport, fan_out=args.fan_out) as server:
        say(ready=True, port=server.port)
        while line := await anyio.to_thread.run_sync(sys.stdin.readline):
            order = json.loads(line)
            if order.get("serve"):
                tensors = make(args.workload, args.scale, fill=True)
                await server.hold(tensors, IDENTITY)
                say(serving=server.port, fingerprint=fingerprint(tensors))
            elif order.get("fingerprint"):
                say(fingerprint=await anyio.to_thread.run_sync(fingerprint, tensors))
            else:
                await pull(tensors, order, server, args)


async def pull(
    tensors: Mapping[str, torch.Tensor], order: dict[str, Any], server: netloader.Server, args: argparse.Namespace
) -> None:
    """Pull once and print the result. The bytes are hashed later, because hashing would slow other transfers."""
    halves: list[float] = []

    def progress(step: netloader.Progress) -> None:
        if not halves and step.verified * 2 >= step.total:
            halves.append(step.seconds)
            say(half=step.seconds, source=step.source)

    registry = Path(order["registry"]) if "registry" in order else None

    def publish(step: netloader.Progress) -> None:
        progress(step)
        if registry is not None:
            (registry / f"{order['host']}:{server.port}").touch()

    began = time.monotonic()
    try:
        report = await netloader.pull(
            tensors,
            IDENTITY,
            sources=order["pull"] if registry is None else Folder(registry, f"{order['host']}:{server.port}"),
            transport=args.transport,
            relay=server if order["relay"] else None,
            follow=order["relay"],
            progress=publish,
            wait=0 if registry is None else 600,
            timeout=order.get("timeout", 600),
        )
    except netloader.NetloaderError as error:
        say(error=str(error), seconds=time.monotonic() - began)
        return
    shares = {source: share.nbytes for source, share in report.sources.items() if share.nbytes}
    done = time.monotonic()
    say(seconds=done - began, done=done, retries=report.retries, sources=shares)


def main() -> None:
    """Run one replica."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", default="llama")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--transport", default="tcp")
    parser.add_argument("--fan-out", type=int, default=1)
    anyio.run(run, parser.parse_args())


if __name__ == "__main__":
    main()
