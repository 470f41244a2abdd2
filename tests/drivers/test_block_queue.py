"""The queue of blocks between the message that releases them and the call that moves them."""

from __future__ import annotations

from itertools import pairwise

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloader.core.manifest import Manifest, TensorSpec
from netloader.core.plan import Plan, make_plan, to_ranges
from netloader.errors import RemoteProtocolError
from netloader.session import block_queue as module
from netloader.session.block_queue import BlockQueue, groups

SIZES = st.lists(st.integers(1, 3000), min_size=1, max_size=60)


def plan_of(sizes: list[int]) -> Plan:
    return make_plan(Manifest(tuple(TensorSpec(f"t{i}", "uint8", (n,)) for i, n in enumerate(sizes))), 2048)


async def all_taken(plan: Plan, cuts: list[int], nbytes: int, spans: int) -> list[list[int]]:
    """Put all blocks of `plan` in, in messages of `cuts` blocks; return the groups that are taken."""
    waiting = BlockQueue(1 << 10, "too many")
    put = 0
    for count in [*cuts, len(plan.blocks)]:
        numbers = range(put, min(put + count, len(plan.blocks)))
        if numbers:
            waiting.put(to_ranges(numbers))
        put = numbers.stop
    found: list[list[int]] = []
    while sum(map(len, found)) < len(plan.blocks) and await waiting.wait():
        found.append(waiting.take(plan, nbytes))
        assert found[-1]
        assert len(found[-1]) == 1 or sum(len(plan.blocks[n].tensors) for n in found[-1]) <= spans
        assert sum(plan.blocks[n].nbytes for n in found[-1][:-1]) < nbytes
    assert waiting.take(plan, nbytes) == []
    waiting.close()
    return found


@given(
    sizes=SIZES, cuts=st.lists(st.integers(1, 20), max_size=20), nbytes=st.integers(1, 9000), spans=st.integers(1, 9)
)
def test_every_block_is_taken_once_and_in_order(sizes: list[int], cuts: list[int], nbytes: int, spans: int) -> None:
    plan = plan_of(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CALL_SPANS", spans)
        found = anyio.run(all_taken, plan, cuts, nbytes, spans)
    assert [number for taken in found for number in taken] == list(range(len(plan.blocks)))


@given(sizes=SIZES, spans=st.integers(1, 9))
def test_groups_hold_all_blocks_in_order(sizes: list[int], spans: int) -> None:
    plan = plan_of(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CALL_SPANS", spans)
        found = list(groups(plan, range(len(plan.blocks))))
    assert [number for group in found for number in group] == list(range(len(plan.blocks)))
    for group in found:
        assert len(group) == 1 or sum(len(plan.blocks[number].tensors) for number in group) <= spans
    for group, after in pairwise(found):
        assert sum(len(plan.blocks[number].tensors) for number in [*group, after[0]]) > spans


async def test_more_blocks_than_allowed_are_an_error() -> None:
    waiting = BlockQueue(2, "the peer has more than 2 open")
    waiting.put(((0, 1),))
    waiting.put(((1, 2),))
    with pytest.raises(RemoteProtocolError, match="more than 2 open"):
        waiting.put(((2, 3),))
    waiting.close()


async def test_closing_the_queue_wakes_its_waiter() -> None:
    waiting = BlockQueue(4, "too many")
    told: list[bool] = []

    async def wait() -> None:
        told.append(await waiting.wait())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        waiting.close()
    assert told == [False]


async def test_dropped_blocks_are_not_taken() -> None:
    plan = plan_of([100, 2048, 2048])
    waiting = BlockQueue(4, "too many")
    waiting.put(((0, 2),))
    assert await waiting.wait()
    waiting.drop()
    waiting.put(((2, 3),))
    assert await waiting.wait()
    assert waiting.take(plan, 1) == [2]
    waiting.close()
