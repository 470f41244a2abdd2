"""From any manifest to blocks: every byte exactly once, the same on both sides."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netloader.core import plan as plan_module
from netloader.core.manifest import ITEM_BYTES, Manifest, TensorSpec
from netloader.core.plan import (
    DEFAULT_BLOCK_BYTES,
    MAX_BLOCK_BYTES,
    MAX_BLOCKS,
    MAX_SPANS,
    MIN_BLOCK_BYTES,
    SMALLEST_USUAL,
    block_bytes_for,
    expand,
    make_plan,
    to_ranges,
)
from netloader.errors import ManifestError
from tests.core.strategies import manifests

block_sizes = st.sampled_from([1024, 1025, 4096, 65536]) | st.integers(MIN_BLOCK_BYTES, 1 << 18)


def many(count: int, nbytes: int) -> Manifest:
    return Manifest(tuple(TensorSpec(f"t{i}", "uint8", (nbytes,)) for i in range(count)))


@given(manifest=manifests(), block_bytes=block_sizes)
@example(manifest=Manifest(()), block_bytes=1024)
@example(manifest=many(MAX_SPANS + 1, 1), block_bytes=1 << 18)
@example(
    manifest=Manifest((TensorSpec("exact", "uint8", (2048,)), TensorSpec("over", "uint8", (2049,)))), block_bytes=1024
)
def test_every_byte_is_in_exactly_one_block(manifest: Manifest, block_bytes: int) -> None:
    manifest.check()
    plan = make_plan(manifest, block_bytes)
    seen: dict[int, list[tuple[int, int]]] = {}
    for number, block in enumerate(plan.blocks):
        assert block.number == number
        assert 1 <= len(block.spans) <= MAX_SPANS
        assert 1 <= block.nbytes <= block_bytes
        assert block.nbytes == sum(span.nbytes for span in block.spans)
        for span in block.spans:
            assert span.nbytes > 0
            seen.setdefault(span.tensor, []).append((span.offset, span.offset + span.nbytes))
        assert plan.tensors_of(number) == tuple(manifest.tensors[s.tensor].name for s in block.spans)
    for index, spec in enumerate(manifest.tensors):
        covered = sorted(seen.pop(index, []))
        position = 0
        for first, end in covered:
            assert first == position
            position = end
        assert position == spec.wire_bytes, spec
    assert not seen
    assert plan.nbytes == manifest.nbytes


@given(manifest=manifests(), block_bytes=block_sizes)
def test_aliases_and_empty_tensors_are_in_no_block(manifest: Manifest, block_bytes: int) -> None:
    used = {span.tensor for block in make_plan(manifest, block_bytes).blocks for span in block.spans}
    without_bytes = {i for i, spec in enumerate(manifest.tensors) if spec.alias_of or 0 in spec.shape}
    assert used == set(range(len(manifest.tensors))) - without_bytes


@given(manifest=manifests(max_tensors=6), block_bytes=block_sizes)
def test_both_sides_derive_the_same_plan(manifest: Manifest, block_bytes: int) -> None:
    again = Manifest(tuple(TensorSpec(*(getattr(t, f) for f in t.__struct_fields__)) for t in manifest.tensors))
    assert make_plan(manifest, block_bytes) == make_plan(again, block_bytes)
    assert make_plan(manifest, block_bytes).digest == make_plan(again, block_bytes).digest


def test_the_plan_digest_depends_on_every_cut() -> None:
    a, b = TensorSpec("a", "uint8", (1500,)), TensorSpec("b", "uint8", (600,))
    plans = [
        make_plan(Manifest((a, b)), 1024),
        make_plan(Manifest((b, a)), 1024),  # order
        make_plan(Manifest((a, b)), 1025),  # size of blocks
        make_plan(Manifest((a, TensorSpec("b", "uint8", (601,)))), 1024),  # bytes
        make_plan(Manifest((a,)), 1024),  # a tensor less
        make_plan(Manifest((a, b, b)), 1024),  # one more
        make_plan(Manifest(()), 1024),
    ]
    assert len({plan.digest for plan in plans}) == len(plans)


def test_the_blocks_of_a_plan_are_unchanged() -> None:
    """Both sides derive them, whatever release they run: another plan would be another protocol."""
    sizes = {"full": 1024, "half": 512, "rest": 512, "tail": 2049, "small": 1, "none": 0, "large": 1023, "last": 2}
    specs = [TensorSpec(name, "uint8", (size,)) for name, size in sizes.items()]
    specs.insert(3, TensorSpec("tied", "uint8", (512,), alias_of="half"))
    plan = make_plan(Manifest(tuple(specs)), 1024)
    assert [[(s.tensor, s.offset, s.nbytes) for s in block.spans] for block in plan.blocks] == [
        [(0, 0, 1024)],
        [(4, 0, 1024)],
        [(4, 1024, 1024)],
        [(4, 2048, 1)],
        [(1, 0, 512), (2, 0, 512)],
        [(5, 0, 1), (7, 0, 1023)],
        [(8, 0, 2)],
    ]
    assert plan.digest == "5a5c87ba64bc7abd0882171f2c92b5e5cf2ca26529b00aacc6e30da60574af28"


@given(data=st.data(), block_bytes=block_sizes)
def test_equal_plan_digests_mean_equal_blocks(data: st.DataObject, block_bytes: int) -> None:
    one = make_plan(data.draw(manifests(max_tensors=4)), block_bytes)
    two = make_plan(data.draw(manifests(max_tensors=4)), data.draw(block_sizes))
    assert (one.digest == two.digest) == (one.blocks == two.blocks)


@pytest.mark.parametrize("block_bytes", [0, -1, MIN_BLOCK_BYTES - 1, MAX_BLOCK_BYTES + 1])
def test_block_sizes_have_limits(block_bytes: int) -> None:
    with pytest.raises(ManifestError, match="block size"):
        make_plan(many(1, 1), block_bytes)


def test_the_number_of_blocks_has_an_exact_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "MAX_BLOCKS", 100)
        exact = Manifest((TensorSpec("big", "uint8", (100 * 1024,)),))
        assert len(make_plan(exact, 1024).blocks) == 100
        # One block more in hardly more bytes: not seen by dividing bytes by the size of a block.
        over = Manifest((TensorSpec("big", "uint8", (99 * 1024,)), *many(2, 513).tensors))
        assert over.nbytes // 1024 == 100
        with pytest.raises(ManifestError, match="more than 100 blocks"):
            make_plan(over, 1024)
    with pytest.raises(ManifestError, match="more than 1048576 blocks"):
        make_plan(Manifest((TensorSpec("vast", "complex128", (1 << 62,)),)), MAX_BLOCK_BYTES)


@given(nbytes=st.integers(0, 1 << 60))
@example(nbytes=0)
@example(nbytes=250_000_000)
@example(nbytes=(1 << 30) - 1)
@example(nbytes=1 << 30)
@example(nbytes=(MAX_BLOCKS // 16) * DEFAULT_BLOCK_BYTES)
@example(nbytes=(MAX_BLOCKS // 16 + 1) * DEFAULT_BLOCK_BYTES)
def test_block_bytes_for_keeps_the_number_of_blocks_moderate(nbytes: int) -> None:
    size = block_bytes_for(nbytes)
    assert SMALLEST_USUAL <= size <= MAX_BLOCK_BYTES
    assert size.bit_count() == 1
    if size < DEFAULT_BLOCK_BYTES:
        assert nbytes < 1 << 30, "only small models have small blocks"
        assert nbytes // size < 512
    assert nbytes // size <= MAX_BLOCKS // 16 or size == MAX_BLOCK_BYTES
    if size > DEFAULT_BLOCK_BYTES:
        assert nbytes // (size // 2) > MAX_BLOCKS // 16, "no larger than needed"


@given(numbers=st.lists(st.integers(0, 200), max_size=100))
def test_ranges_round_trip(numbers: list[int]) -> None:
    ranges = to_ranges(numbers)
    assert expand(ranges) == tuple(sorted(set(numbers)))
    assert all(first < end for first, end in ranges)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges)), "neighbours are joined"
    assert to_ranges(expand(ranges)) == ranges


def test_every_dtype_can_be_planned() -> None:
    manifest = Manifest(tuple(TensorSpec(f"t.{dtype}", dtype, (3, 5)) for dtype in ITEM_BYTES))
    manifest.check()
    assert make_plan(manifest, 1024).nbytes == 15 * sum(ITEM_BYTES.values())
