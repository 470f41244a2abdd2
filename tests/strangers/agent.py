"""One host of `test_namespaces`: strangers, or a client, in a process of its own that takes one order a line.

``strangers ADDRESS NAME;NAME`` connects strangers of these kinds, and ``stop`` closes them. ``pull ADDRESS TOKEN``
pulls into new tensors and answers with the seconds to the first verified block and to the end. Each answer is a line.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from contextlib import AsyncExitStack

import anyio
import anyio.to_thread

import netloader
from netloader.errors import NetloaderError
from tests.strangers.kinds import KINDS, strangers

WAIT = 10.0


async def pull(address: str, token: str) -> dict[str, object]:
    began, first = time.monotonic(), list[float]()

    def progress(_: object) -> None:
        if not first:
            first.append(time.monotonic() - began)

    try:
        _, report = await netloader.pull_new(
            sources=[address], token=token.encode() or None, wait=WAIT, timeout=100, transport="tcp", progress=progress
        )
    except NetloaderError as error:
        return {"error": str(error)}
    return {
        "begin": first[0],
        "end": time.monotonic() - began,
        "root": report.root,
        "attempts": list(map(str, report.attempts)),
    }


async def main() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    async with AsyncExitStack() as stack:
        while line := await anyio.to_thread.run_sync(sys.stdin.readline):
            order, _, rest = line.rstrip("\n").partition(" ")
            answer: dict[str, object] = {}
            if order == "pull":
                address, _, token = rest.partition(" ")
                answer = await pull(address, token)
            elif order == "stop":
                await stack.aclose()
            else:
                address, _, names = rest.partition(" ")
                host, _, port = address.rpartition(":")
                kinds = [KINDS[name] for name in names.split(";")]
                await stack.enter_async_context(strangers(kinds, host, int(port)))
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    anyio.run(main)
