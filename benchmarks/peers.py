"""Both ends of each way to move tensors that the benchmarks compare; every server runs in its own process.

A server process prints one JSON line when it is ready, and serves until its standard input closes.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import threading
from collections.abc import Mapping
from datetime import timedelta

import anyio
import torch
from torch import distributed as dist

from benchmarks.workloads import make

__all__ = ["plain_pull", "serve_netloader", "serve_plain"]

_TIMEOUT = timedelta(seconds=120)


def _group(address: tuple[str, int], rank: int) -> dist.ProcessGroupGloo:
    """A group of two: rank 0 receives; rank 1, the server, hosts the store for one rendezvous."""
    store = dist.TCPStore(
        address[0], address[1], world_size=2, is_master=rank == 1, timeout=_TIMEOUT, wait_for_workers=False
    )
    return dist.ProcessGroupGloo(dist.PrefixStore("bench", store), rank, 2, _TIMEOUT)


def plain_pull(control: socket.socket, tensors: Mapping[str, torch.Tensor]) -> None:
    """The plain gloo loop: one receive and wait for each tensor, in order, no checks."""
    control.sendall(b"go\n")
    port = int(control.makefile().readline())
    group = _group(("127.0.0.1", port), 0)
    for tensor in tensors.values():
        group.recv([tensor.reshape(-1).view(torch.uint8)], 1, 0).wait()


def serve_plain(tensors: Mapping[str, torch.Tensor]) -> None:
    """The plain gloo loop: one send and wait for each tensor, in order; one client after the other."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            with client:
                if not client.recv(16):
                    continue
                store = dist.TCPStore(
                    "127.0.0.1", 0, world_size=2, is_master=True, timeout=_TIMEOUT, wait_for_workers=False
                )
                client.sendall(f"{store.port}\n".encode())
                group = dist.ProcessGroupGloo(dist.PrefixStore("bench", store), 1, 2, _TIMEOUT)
                for tensor in tensors.values():
                    group.send([tensor.reshape(-1).view(torch.uint8)], 0, 0).wait()
                del group, store

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


def serve_netloader(tensors: Mapping[str, torch.Tensor], transport: str) -> None:
    """A netloader server."""
    import netloader

    async def run() -> None:
        identity = netloader.ModelIdentity(model="bench")
        async with netloader.Server(tensors, identity, host="127.0.0.1", transport=transport.split(",")) as server:
            print(json.dumps({"port": server.port}), flush=True)
            await anyio.to_thread.run_sync(sys.stdin.read)

    anyio.run(run)


def main() -> None:
    """Run one server process."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("kind", choices=["plain", "netloader"])
    parser.add_argument("workload")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--transport", default="gloo")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    tensors = make(args.workload, args.scale, fill=True, device=args.device)
    if args.kind == "plain":
        serve_plain(tensors)
    else:
        serve_netloader(tensors, args.transport)


if __name__ == "__main__":
    main()
