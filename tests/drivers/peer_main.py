"""A server or a client in a separate process; reports in JSON lines on stdout, and ends when its stdin closes.

Usage: ``python -m tests.drivers.peer_main serve|pull|pulls|relay '{"...": ...}'``
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import resource
import sys
import threading
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from netloader.client.pull import pull_from
from netloader.core.addresses import Address
from netloader.core.options import PullOptions, Timings
from netloader.core.report import Progress, PullReport
from netloader.discovery.fixed import FixedSources
from netloader.errors import NetloaderError, NoSourceLeft
from netloader.tensors import destination, digest_of
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport, Side
from tests.drivers import kit


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def transport_of(options: dict[str, Any], side: Side) -> Any:
    held = [Fault(FaultKind.HOLD, block, side=side, times=None) for block in options.get("hold", ())]
    return FaultyTransport(kit.carrier(options.get("transport", "gloo")), Faults(held))


def footprint() -> dict[str, int]:
    """Descriptors, threads, idle pool threads and resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    pooled = sum(thread.name == "AnyIO worker thread" for thread in threading.enumerate())
    return {
        "fds": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        "threads": sum(1 for _ in Path("/proc/self/task").iterdir()) - pooled,  # with those that Python did not start
        "pooled": pooled,
        "rss": pages * resource.getpagesize(),
    }


def token_of(options: dict[str, Any]) -> bytes | None:
    token = options.get("token")
    return None if token is None else token.encode()


def timings(options: dict[str, Any]) -> Timings:
    return Timings(**options.get("timings", {}))


async def serve(options: dict[str, Any], ask: Any) -> None:
    holding = kit.held(kit.weights(options.get("seed", 0), options.get("rows", 40)))
    transport = transport_of(options, Side.SEND)
    chosen = {**options.get("server", {}), "token": token_of(options)}
    async with kit.serving(transport, holding, timings=timings(options), **chosen) as server:
        server.ended = deque(maxlen=20)
        say(port=server.port, root=holding.announcement.root, **footprint())
        while True:
            command = await ask()
            if command == "look":
                say(sessions=[session.state.name for session in server.sessions], **footprint())
            elif command == "errors":
                say(errors=[type(s.session.error).__name__ for s in server.ended])
                server.ended.clear()
            else:
                return


async def pull(options: dict[str, Any]) -> None:
    into = kit.blank(kit.weights(options.get("seed", 0), options.get("rows", 40)))
    sources = [Address("127.0.0.1", port) for port in options["ports"]]

    def progress(step: Progress) -> None:
        say(verified=step.verified, source=step.source)

    try:
        report = await kit.pull(
            into,
            sources,
            transport_of(options, Side.RECV),
            progress=progress,
            timings=timings(options),
            token=token_of(options),
            **options.get("client", {}),
        )
    except NoSourceLeft as error:
        say(failed=str(error), causes=[type(a.cause).__name__ for a in error.attempts], verified=error.verified)
        return
    except NetloaderError as error:
        say(failed=str(error))
        return
    right = kit.contents(kit.weights(options.get("seed", 0), options.get("rows", 40))) == kit.contents(into)
    say(
        done=True,
        right=right,
        seconds=report.seconds,
        blocks={source: share.blocks for source, share in report.sources.items()},
    )


async def relay(options: dict[str, Any], ask: Any) -> None:
    """A client that relays its blocks while it pulls."""
    into = kit.blank(kit.weights(options.get("seed", 0), options.get("rows", 40)))
    sources = [Address("127.0.0.1", port) for port in options["ports"]]
    transport = transport_of(options, Side.SEND)
    chosen = PullOptions(timings=timings(options), **options.get("client", {}))
    async with kit.serving(transport, timings=timings(options)) as server, anyio.create_task_group() as tasks:
        reports: list[PullReport] = []

        async def work() -> None:
            reports.append(
                await pull_from(
                    destination(into), kit.IDENTITY, FixedSources(sources), [transport], digest_of, chosen, relay=server
                )
            )

        tasks.start_soon(work)
        say(port=server.port)
        while await ask() == "look":
            say(sessions=[session.state.name for session in server.sessions], complete=bool(reports))
        tasks.cancel_scope.cancel()


async def pull_again_and_again(options: dict[str, Any], ask: Any) -> None:
    """A pull for each line on stdin."""
    say(ready=True)
    while await ask():
        await pull(options)


async def main() -> None:
    role, options = sys.argv[1], json.loads(sys.argv[2])
    logging.basicConfig(level=options.get("log", "WARNING"), stream=sys.stderr)
    ask = partial(anyio.to_thread.run_sync, lambda: sys.stdin.readline().strip())
    if role == "serve":
        await serve(options, ask)
    elif role == "relay":
        await relay(options, ask)
    elif role == "pulls":
        await pull_again_and_again(options, ask)
    else:
        await pull(options)


if __name__ == "__main__":
    # At exit Python runs the garbage collector over all of torch: half a second, and tests start many of these.
    atexit.register(gc.freeze)
    anyio.run(main)
