"""Garbage sent to the port of a server process: no resource leaks, and a concurrent pull is right."""

from __future__ import annotations

import statistics
from typing import Any

import anyio
import anyio.to_thread

from tests.drivers import garbage, peers

ROUND = garbage.Amount(frames=5_000, silent=200, resets=200)
PULLS = 3
"""Of the quiet ones, and in each round of garbage: half a gigabyte each, most of what this test costs."""
SLOWER = 3.0
POOLED = 3
"""Threads of the pool: one waits for the next command, and of one client at a time two looks at blocks may meet."""


async def test_garbage_leaves_no_descriptor_thread_or_memory_and_does_not_disturb_a_pull() -> None:
    async with peers.peer("serve", rows=1000, log="ERROR", timings={"hello": 1.0, "validate": 1.0}) as server:
        port = (await server.hear())["port"]
        async with peers.peer("pulls", rows=1000, ports=[port]) as client:
            await client.hear()
            await client.pull()  # the first one includes what both processes load only once
            quiet = statistics.median([await client.pull() for _ in range(PULLS)])
            ratios: list[float] = []
            after: list[dict[str, Any]] = []
            for number in range(2):
                ratios += [seconds / quiet for seconds in await pulls_during_traffic(client, port, number)]
                after.append(await at_rest(server))
        slower = statistics.median(ratios)
        assert slower < SLOWER, f"a quiet pull takes {quiet:.3f} s; with garbage {slower:.2f} times that: {ratios}"
        first, second = after
        assert second["fds"] == first["fds"]
        assert second["threads"] <= first["threads"]
        # Their number depends on how many calls overlapped; a thread that is idle for long is ended.
        assert second["pooled"] <= POOLED
        assert second["rss"] - first["rss"] < 4 << 20
        assert await server.finish() == 0


async def at_rest(server: peers.Peer) -> dict[str, Any]:
    """The server's figures once it has no session, and as many descriptors as at the previous poll.

    A connection has its descriptor for some iterations of the event loop before it has a session, and for one after
    that; and the last ones may still wait to be accepted.
    """
    descriptors: list[int] = []

    def is_at_rest(seen: dict[str, Any]) -> bool:
        descriptors.append(seen["fds"])
        return not seen["sessions"] and descriptors[-2:] == [seen["fds"]] * 2

    return await server.until(is_at_rest)


async def pulls_during_traffic(client: peers.Peer, port: int, seed: int) -> list[float]:
    """Send one round of garbage; return the seconds of the pulls that began and ended during it."""
    begun = anyio.Event()
    over = False

    def started() -> bool:
        anyio.from_thread.run_sync(begun.set)
        return False

    async def traffic() -> None:
        nonlocal over
        made = await anyio.to_thread.run_sync(garbage.round_of, port, ROUND, seed, started)
        over = True
        assert made > ROUND.frames // 4

    within: list[float] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(traffic)
        await begun.wait()
        while not over and len(within) < PULLS:
            seconds = await client.pull()
            if not over:
                within.append(seconds)
    assert within, "no pull ended before the traffic did"
    return within
