"""Digests of blocks: what they detect, how they are computed."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from netloader.codecs.regions import Regions, regions_of
from netloader.core.identity import ModelIdentity
from netloader.core.manifest import DIGEST_BYTES, compute_root, manifest_digest
from netloader.core.plan import MIN_BLOCK_BYTES
from netloader.errors import ManifestError, TransportUnavailable
from netloader.tensors import ALGORITHMS, DEFAULT, TensorHolding, digest_of, digest_plan, digests, hold
from netloader.transports.base import BlockView
from tests.tensor_sets import Sketch, build, sketches

IDENTITY = ModelIdentity(model="m")


def digests_now(holding: TensorHolding) -> list[bytes]:
    plan = holding.announcement.plan
    views = holding.memory.views(plan, range(len(plan.blocks)))
    return [digest_of(view, holding.announcement.algorithm) for view in views]


def announced(holding: TensorHolding) -> list[bytes]:
    joined = holding.announcement.digests
    return [joined[at : at + DIGEST_BYTES] for at in range(0, len(joined), DIGEST_BYTES)]


def large_set(seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    large = {f"w{n}": torch.randint(0, 255, (50_000,), dtype=torch.uint8, generator=generator) for n in range(8)}
    small = {f"b{n}": torch.randint(0, 255, (700,), dtype=torch.uint8, generator=generator) for n in range(40)}
    return large | small


def test_every_algorithm_has_digests_of_the_announced_size() -> None:
    assert DEFAULT in ALGORITHMS
    for algorithm in ALGORITHMS:
        (digest,) = digests_now(hold({"w": torch.ones(3)}, IDENTITY, algorithm=algorithm))
        assert len(digest) == DIGEST_BYTES


def test_a_digest_covers_the_bytes_in_the_order_of_the_spans() -> None:
    tensors = {"a": torch.arange(10), "b": torch.ones(3, dtype=torch.bool), "c": torch.tensor(1.5)}
    (digest,) = digests_now(hold(tensors, IDENTITY))
    joined = b"".join(t.numpy().tobytes() for t in tensors.values())
    assert digest == xxhash.xxh3_128_digest(joined)


def test_an_unknown_algorithm_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ManifestError, match=r"'md4' is unknown here, known are: xxh3-128"):
        hold({"w": torch.ones(3)}, IDENTITY, algorithm="md4")
    holding = hold({"w": torch.ones(3)}, IDENTITY)
    (view,) = holding.memory.views(holding.announcement.plan, [0])
    with pytest.raises(ManifestError, match="known are"):
        digest_of(view, "md4")


@given(sketch=sketches(), threads=st.integers(0, 4), block_bytes=st.sampled_from([MIN_BLOCK_BYTES, 1 << 20]))
def test_a_holding_announces_the_digests_of_its_memory(sketch: list[Sketch], threads: int, block_bytes: int) -> None:
    holding = hold(build(sketch, seed=3), IDENTITY, block_bytes=block_bytes, threads=threads)
    said = holding.announcement
    assert announced(holding) == digests_now(holding)
    assert said.manifest_digest == manifest_digest(said.manifest)
    assert said.root == compute_root(said.manifest, block_bytes, said.algorithm, said.digests)
    again = hold(build(sketch, seed=3), IDENTITY, block_bytes=block_bytes).announcement
    assert (again.root, again.manifest, again.digests) == (said.root, said.manifest, said.digests)


@given(bit=st.integers(0, 7), data=st.data())
def test_a_flipped_bit_is_detected_in_its_block_only(bit: int, data: st.DataObject) -> None:
    holding = hold(large_set(), IDENTITY, block_bytes=16_384)
    blocks = holding.announcement.plan.blocks
    number = data.draw(st.integers(0, len(blocks) - 1))
    (view,) = holding.memory.views(holding.announcement.plan, [number])
    buffer = view.buffers()[data.draw(st.integers(0, len(blocks[number].spans) - 1))]
    buffer[data.draw(st.integers(0, len(buffer) - 1))] ^= 1 << bit
    differing = [
        n for n, (now, then) in enumerate(zip(digests_now(holding), announced(holding), strict=True)) if now != then
    ]
    assert differing == [number]


def test_a_swapped_block_is_detected() -> None:
    holding = hold(large_set(), IDENTITY, block_bytes=16_384)
    first, second = holding.memory.views(holding.announcement.plan, [0, 1])
    kept = first.buffers()[0].tobytes()
    first.buffers()[0][:] = second.buffers()[0]
    second.buffers()[0][:] = kept
    now, then = digests_now(holding), announced(holding)
    assert (now[0], now[1]) == (then[1], then[0])
    assert now[0] != then[0]


def test_a_missing_block_is_detected() -> None:
    holding = hold(large_set(), IDENTITY, block_bytes=16_384)
    zeroed = hold({k: torch.zeros_like(v) for k, v in large_set().items()}, IDENTITY, block_bytes=16_384)
    assert all(now != then for now, then in zip(digests_now(zeroed), announced(holding), strict=True))


def test_equal_shapes_with_other_contents_have_another_root() -> None:
    assert hold(large_set(1), IDENTITY).announcement.root != hold(large_set(2), IDENTITY).announcement.root


def test_the_root_does_not_depend_on_the_number_of_threads() -> None:
    roots = {hold(large_set(), IDENTITY, block_bytes=2048, threads=threads).announcement.root for threads in (1, 2, 5)}
    assert len(roots) == 1


def test_progress_ends_with_all_bytes_and_runs_in_the_calling_thread() -> None:
    seen: list[tuple[int, int]] = []
    threads = set()

    def progress(hashed: int, total: int) -> None:
        threads.add(threading.get_ident())
        seen.append((hashed, total))

    holding = hold(large_set(), IDENTITY, block_bytes=2048, threads=3, progress=progress)
    total = holding.announcement.plan.nbytes
    assert threads == {threading.get_ident()}
    assert [hashed for hashed, _ in seen] == sorted(hashed for hashed, _ in seen)
    assert seen[-1] == (total, total)
    assert seen.count((total, total)) == 1


def test_an_error_of_the_progress_callback_ends_the_work() -> None:
    def progress(hashed: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hold(large_set(), IDENTITY, block_bytes=2048, threads=3, progress=progress)
    assert [t.name for t in threading.enumerate() if t.name.startswith("netloader-digest")] == []


def test_a_helper_thread_that_hangs_is_named_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like a file on a server that does not answer: its memory is read only now."""
    go, hanging = threading.Event(), list[threading.Thread]()

    def hangs(view: BlockView, algorithm: str) -> bytes:
        if threading.current_thread().name.startswith("netloader-digest"):
            hanging.append(threading.current_thread())
            assert go.wait(60)
        return digest_of(view, algorithm)

    holding = hold(large_set(), IDENTITY, block_bytes=MIN_BLOCK_BYTES)
    announcement = holding.announcement
    monkeypatch.setattr(digests, "digest_of", hangs)
    monkeypatch.setattr(digests, "_STALL_SECONDS", 0.05)

    def wait_for_the_helper(*_: int) -> None:
        while not hanging:
            time.sleep(0)

    try:
        with pytest.raises(ManifestError, match=r"thread netloader-digest-1 has hashed nothing for 0.05 s .*storage"):
            digest_plan(holding.memory, announcement.plan, DEFAULT, threads=2, progress=wait_for_the_helper)
    finally:
        go.set()
        for thread in hanging:
            thread.join(60)


def test_an_error_in_a_helper_thread_reaches_the_caller() -> None:
    holding = hold(large_set(), IDENTITY, block_bytes=2048)

    class Failing:
        def views(self, plan: object, numbers: Sequence[int]) -> Sequence[object]:
            if threading.current_thread().name.startswith("netloader-digest"):
                raise ManifestError("dropped meanwhile")
            started.wait(10)
            return holding.memory.views(holding.announcement.plan, numbers)

    started = threading.Event()

    class Slow(Failing):
        def views(self, plan: object, numbers: Sequence[int]) -> Sequence[object]:
            try:
                return super().views(plan, numbers)
            finally:
                started.set()

    with pytest.raises(ManifestError, match="dropped meanwhile"):
        digest_plan(Slow(), holding.announcement.plan, DEFAULT, threads=2)  # type: ignore[arg-type]


class OnDevice:
    """A block whose memory has no byte views, as on an accelerator."""

    def __init__(self, spans: Sequence[torch.Tensor]) -> None:
        self.number = 0
        self.nbytes = sum(span.numel() for span in spans)
        self._spans = spans

    def tensors(self) -> Sequence[torch.Tensor]:
        return self._spans

    def buffers(self) -> Sequence[memoryview]:
        raise TransportUnavailable("not the CPU's memory")

    def regions(self) -> Regions[int]:
        return regions_of(self.buffers())

    def settle(self) -> None:
        pass


@given(sizes=st.lists(st.sampled_from([1, 1000, (1 << 20) - 1, 1 << 20, (2 << 20) + 1]), max_size=3))
def test_device_memory_is_hashed_through_bounded_copies(sizes: list[int]) -> None:
    spans = [torch.arange(size).to(torch.uint8) for size in sizes]
    expected = xxhash.xxh3_128_digest(b"".join(span.numpy().tobytes() for span in spans))
    assert digest_of(OnDevice(spans), DEFAULT) == expected
