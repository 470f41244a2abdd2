"""The limit of what a server sends: never more, all of it used, and shared equally."""

from __future__ import annotations

import time
from collections import Counter

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloader.server.bandwidth import Bandwidth
from tests.drivers import kit

RATE = 10e6


async def sends(limit: Bandwidth, client: str, calls: list[int], sent: list[tuple[float, str, int]]) -> None:
    for nbytes in calls:
        await limit.wait(client, nbytes)
        sent.append((time.monotonic(), client, nbytes))
    limit.leave(client)


async def test_without_a_limit_nobody_waits() -> None:
    limit = Bandwidth(None)
    assert limit.slice_bytes is None
    with anyio.fail_after(1):
        for _ in range(1000):
            await limit.wait("a", 1 << 40)


async def test_the_limit_is_kept_and_used() -> None:
    limit, sent = Bandwidth(RATE), list[tuple[float, str, int]]()
    began = time.monotonic()
    await sends(limit, "a", [500_000] * 20, sent)
    took = time.monotonic() - began
    least = (20 - 1) * 500_000 / RATE - 0.05  # the last call may begin before its bytes have passed
    assert least <= took < least + 0.5


@pytest.mark.parametrize("clients", [2, 5])
async def test_clients_share_equally_whatever_the_size_of_their_calls(clients: int) -> None:
    limit, sent = Bandwidth(RATE), list[tuple[float, str, int]]()
    await limit.wait("before", 1_000_000)  # what may be sent at once is used up
    async with anyio.create_task_group() as tasks:
        for number in range(clients):
            nbytes = 100_000 * (number + 1)
            tasks.start_soon(sends, limit, str(number), [nbytes] * (4_000_000 // nbytes), sent)
    early = Counter[str]()
    for _, client, nbytes in sent:
        early[client] += nbytes
        if max(early.values()) >= 2_000_000:
            break
    assert len(early) == clients
    assert max(early.values()) - min(early.values()) <= 100_000 * (clients + 1)


async def test_a_new_client_is_served_at_once_and_gets_no_more_than_its_share() -> None:
    limit, sent = Bandwidth(RATE), list[tuple[float, str, int]]()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sends, limit, "old", [250_000] * 40, sent)
        await kit.until(lambda: len(sent) >= 10)
        before = len(sent)
        tasks.start_soon(sends, limit, "new", [250_000] * 10, sent)
    after = [client for _, client, _ in sent[before:]]
    assert "new" in after[:3]
    assert abs(Counter(after[:18])["new"] - 9) <= 1


async def test_a_client_that_is_cancelled_holds_nobody_up() -> None:
    limit, sent = Bandwidth(RATE), list[tuple[float, str, int]]()
    await limit.wait("first", 1_000_000)  # the next one waits for 0.1 s
    async with anyio.create_task_group() as tasks:
        with anyio.move_on_after(0.01):
            await limit.wait("cancelled", 1 << 40)
        with anyio.fail_after(5):
            await sends(limit, "other", [1], sent)
        tasks.cancel_scope.cancel()
    assert sent


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 1000)), min_size=1, max_size=30))
def test_in_virtual_time_the_limit_is_exact(calls: list[tuple[str, int]]) -> None:
    """One after another, with a clock that the test moves: each call begins when the bytes before it have passed."""
    clock = [0.0]
    limit = Bandwidth(1000.0, lambda: clock[0])

    async def run() -> None:
        free = 0.0  # when the bytes so far have passed, but for a burst after a pause
        for client, nbytes in calls:
            clock[0] = max(clock[0], free) - 1e-6
            with anyio.move_on_after(0.001) as early:
                await limit.wait(client, nbytes)
            assert early.cancelled_caught or free <= clock[0]
            clock[0] += 1e-6
            if early.cancelled_caught:
                with anyio.fail_after(5):
                    await limit.wait(client, nbytes)
            free = max(free, clock[0] - 0.05) + nbytes / 1000.0

    anyio.run(run)


@pytest.mark.parametrize("clients", [1, 3])
async def test_a_server_keeps_its_limit(clients: int) -> None:
    weights = kit.weights(rows=1000)  # about 4 MB
    holding = kit.held(weights)
    rate, tcp = 8e6, kit.carrier("tcp")
    nbytes = holding.announcement.plan.nbytes
    async with kit.serving(tcp, holding, max_bandwidth=rate) as server:
        began = time.monotonic()
        async with anyio.create_task_group() as tasks:
            into = [kit.blank(weights) for _ in range(clients)]
            for one in into:
                tasks.start_soon(kit.pull, one, [kit.at(server)], tcp)
        took = time.monotonic() - began
    assert all(kit.contents(one) == kit.contents(weights) for one in into)
    largest = max(block.nbytes for block in holding.announcement.plan.blocks)
    assert took >= (clients * nbytes - 2 * clients * largest) / rate - 0.1
    assert took < 3 * clients * nbytes / rate + 2
