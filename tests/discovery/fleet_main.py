"""A process of `tests.discovery.fleet`: several servers of one model, until its stdin ends."""

from __future__ import annotations

import json
import sys
from contextlib import AsyncExitStack

import anyio
import anyio.to_thread

import netloader
from tests.discovery.fleet import identity, weights


async def main(hosts: list[str], port: int, seed: int, discovery: str | None) -> None:
    held = weights(seed)
    async with AsyncExitStack() as stack:
        for host in hosts:
            server = netloader.Server(held, identity(seed), host=host, port=port, discovery=discovery)
            await stack.enter_async_context(server)
        print("ready", flush=True)
        await anyio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)


if __name__ == "__main__":
    anyio.run(lambda: main(**json.loads(sys.argv[1])))
