"""Blocks of many spans packed into one staging tensor, and groups of byte views."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netloader.codecs.packed import pack, staging_bytes, staging_for, unpack, worth_packing
from netloader.codecs.raw import grouped_buffers, spans
from netloader.codecs.regions import Regions, regions_of
from netloader.core.plan import make_plan
from netloader.errors import ManifestError, TransportUnavailable
from netloader.tensors import describe
from tests.tensor_sets import Sketch, build, differing, sketches


class Meta:
    """A block on a device without byte views."""

    number = 7

    def __init__(self, sizes: Sequence[int]) -> None:
        self.nbytes = sum(sizes)
        self._spans = [torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes]

    def tensors(self) -> Sequence[torch.Tensor]:
        return self._spans

    def buffers(self) -> Sequence[memoryview]:
        raise TransportUnavailable("no byte views here")

    def regions(self) -> Regions[int]:
        return regions_of(self.buffers())

    def settle(self) -> None:
        pass


@given(sketch=sketches(), block_bytes=st.sampled_from([1024, 1 << 20]), spare=st.integers(0, 3))
def test_packing_and_unpacking_moves_every_byte(sketch: list[Sketch], block_bytes: int, spare: int) -> None:
    source, target = build(sketch, seed=9), build(sketch, seed=None)
    (manifest, ours), (_, theirs) = describe(source), describe(target)
    plan = make_plan(manifest, block_bytes)
    numbers = range(len(plan.blocks))
    views = ours.views(plan, numbers)
    staging = staging_for(max((view.nbytes for view in views), default=0) + spare, "cpu")
    for here, there in zip(views, theirs.views(plan, numbers), strict=True):
        packed = pack(here, staging)
        assert packed.numel() == here.nbytes
        assert packed.numpy().tobytes() == b"".join(here.buffers())
        received = staging_for(len(staging), "cpu")
        received[: here.nbytes].copy_(packed)
        unpack(received, there)
    assert differing(source, target) == []


def test_only_blocks_of_several_spans_are_worth_packing() -> None:
    manifest, memory = describe({"large": torch.ones(1000), "a": torch.ones(10), "b": torch.ones(20)})
    plan = make_plan(manifest, 2048)
    views = memory.views(plan, range(len(plan.blocks)))
    assert [worth_packing(view) for view in views] == [False, False, True]
    assert staging_bytes(views) == 120
    assert staging_bytes(views[:2]) == 0
    assert worth_packing(Meta([1, 2]))
    assert not worth_packing(Meta([3]))


def test_device_spans_are_packed_by_one_operation() -> None:
    view, staging = Meta([3, 5]), staging_for(10, "meta")
    assert pack(view, staging).numel() == 8
    unpack(staging, view)
    assert pack(Meta([]), staging).numel() == 0
    unpack(staging, Meta([]))


def test_staging_memory_has_to_fit() -> None:
    view = Meta([3, 5])
    with pytest.raises(ManifestError, match="block 7 has 8 bytes, the staging tensor only 7"):
        pack(view, staging_for(7, "meta"))
    for odd in (
        torch.empty(4, dtype=torch.int16),
        torch.empty(4, 4, dtype=torch.uint8),
        torch.empty(9, dtype=torch.uint8)[::2],
    ):
        with pytest.raises(ManifestError, match="one contiguous row of uint8"):
            unpack(odd, view)


@given(sketch=sketches(), most=st.integers(1, 5), nbytes=st.sampled_from([1, 100, 5000]))
def test_groups_hold_all_byte_views_in_order(sketch: list[Sketch], most: int, nbytes: int) -> None:
    manifest, memory = describe(build(sketch, seed=2))
    plan = make_plan(manifest, 1024)
    views = memory.views(plan, range(len(plan.blocks)))
    groups = list(grouped_buffers(views, most, nbytes))
    assert b"".join(b"".join(group) for group in groups) == b"".join(b"".join(view.buffers()) for view in views)
    assert b"".join(span.numpy().tobytes() for span in spans(views)) == b"".join(b"".join(group) for group in groups)
    for group in groups:
        assert 1 <= len(group) <= most
        assert sum(len(buffer) for buffer in group[:-1]) < nbytes
    for group in groups[:-1]:
        assert len(group) == most or sum(len(buffer) for buffer in group) >= nbytes
