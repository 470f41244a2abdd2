"""Raw bytes computed from tensors in another form: by blocks, whatever their cuts, and never more than is asked for."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import anyio
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import netloader
from netloader.core.identity import ModelIdentity
from netloader.core.manifest import DIGEST_BYTES
from netloader.core.protocol.events import Announcement
from netloader.errors import ManifestError
from netloader.session.off_loop import in_thread
from netloader.tensors import (
    ComputedBlock,
    ComputedMemory,
    Inverse,
    Scratch,
    TensorHolding,
    TensorMemory,
    digest_plan,
    hold,
)
from netloader.tensors import computed as module
from netloader.tensors.computed import _boxes
from netloader.vllm.model.inverses import Form, as_it_is, find_inverse, sample_of

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn, torch.int64]


def row_major(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose strides are those of its shape, also in dimensions of size 1."""
    return tensor.clone(memory_format=torch.contiguous_format)


Change = Callable[[torch.Tensor], torch.Tensor]
CHANGES: Mapping[str, Change] = {
    "transposed": lambda raw: raw.transpose(-1, -2).contiguous(),
    "transposed view": lambda raw: raw.transpose(-1, -2),
    "flattened": lambda raw: raw.reshape(-1),
    "as bytes": lambda raw: raw.contiguous().view(torch.uint8),
    "transposed, as bytes": lambda raw: (
        raw.transpose(-1, -2).clone(memory_format=torch.contiguous_format).view(torch.uint8)
    ),
    "wider": lambda raw: raw.float(),
    "wider and flattened": lambda raw: raw.float().reshape(-1),
    "wider and transposed": lambda raw: raw.float().transpose(-1, -2).contiguous(),
    "in a larger storage": lambda raw: torch.cat([raw, raw])[raw.shape[0] :].transpose(-1, -2),
}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Any bits, but no NaN, which a cast may change."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator).to(dtype)
    return torch.randint(-120, 120, shape, generator=generator).to(dtype)


def form_of(raw: torch.Tensor) -> Form:
    return Form(raw.dtype, tuple(raw.shape), tuple(raw.stride()))


def way_back(raw: torch.Tensor, now: torch.Tensor) -> Inverse | None:
    scratch = Scratch(CPU)
    sample = sample_of(raw, as_it_is(raw.nbytes), raw.nbytes, scratch)
    return find_inverse(form_of(raw), sample, now, scratch)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_any_range_of_a_view_is_a_few_boxes_in_order(shape: list[int], data: st.DataObject) -> None:
    count = math.prod(shape)
    first = data.draw(st.integers(0, count))
    past = data.draw(st.integers(first, count))
    numbers = torch.arange(count).view(shape)
    boxes = list(_boxes(shape, first, past))
    found = [
        number
        for box in boxes
        for number in numbers[
            tuple(slice(at, at + size) for at, size in zip(box.start, box.size, strict=True))
        ].flatten()
    ]
    assert found == list(range(first, past))
    assert len(boxes) <= 2 * len(shape)
    for box in boxes:
        if math.prod(box.size) > 1:
            halves = [math.prod(half.size) for half in box.halves()]
            assert sum(halves) == math.prod(box.size)


@pytest.mark.parametrize("change", CHANGES)
@given(data=st.data())
def test_all_blocks_have_the_bytes_of_the_raw_tensors(change: str, data: st.DataObject) -> None:
    """Blocks cut rows and elements anywhere, and pack several tensors, computed or not."""
    dtype = data.draw(st.sampled_from([torch.bfloat16] if "wider" in change else DTYPES))
    shape = data.draw(st.lists(st.integers(1, 40), min_size=2, max_size=3))
    raw = random(*shape, dtype=dtype)
    if data.draw(st.booleans()):
        raw = raw.transpose(0, -1).contiguous().transpose(0, -1)
    plain, more = random(333, seed=1), random(4, 60, seed=2)
    before = {"a": plain, "raw": raw, "b": more}
    now = CHANGES[change](raw)
    inverse = way_back(raw, now)
    assert inverse is not None
    holding = hold(before, ModelIdentity(), block_bytes=data.draw(st.integers(1024, 5000)))
    known = holding.announcement
    memory = TensorMemory(known.manifest, [plain, now, more], CPU)
    computed = ComputedMemory(memory, {1: inverse}, Scratch(CPU))
    assert digest_plan(computed, known.plan, known.algorithm, threads=1) == known.digests


@pytest.mark.parametrize(
    ("raw", "now", "steps"),
    [
        (random(8, 6), random(8, 6).t().contiguous(), ("transpose",)),
        (random(8, 6, dtype=torch.int8), random(8, 6, dtype=torch.int8).flatten(), ()),
        (random(8, 4), random(8, 4).t(), ()),
        (
            random(8, 4, dtype=torch.int8),
            random(8, 4, dtype=torch.int8).t().contiguous().view(torch.int32),
            ("view int8", "transpose"),
        ),
        (
            random(8, 1, dtype=torch.bfloat16),
            random(8, 1, dtype=torch.bfloat16).float().view(8),
            ("cast to bfloat16", "reshape"),
        ),
        (
            random(7, 7, 32).transpose(0, -1),
            random(7, 7, 32).transpose(0, -1).transpose(-1, -2).contiguous(),
            ("transpose",),
        ),
        (random(8, 6), random(8, 6).add(1), None),
        (random(8, 6), random(8, 6).bfloat16(), None),
        (random(8, 6, dtype=torch.int8), random(8, 6, dtype=torch.int8).float(), None),
        (random(8, 6), random(6, 8, seed=1), None),
        (random(8, 6), random(8, 7, seed=1), None),
        (random(8, 6), torch.empty(0), None),
    ],
)
def test_the_way_back(raw: torch.Tensor, now: torch.Tensor, steps: tuple[str, ...] | None) -> None:
    inverse = way_back(raw, now)
    assert (None if inverse is None else inverse.steps) == steps
    if steps == ():
        assert inverse == as_it_is(raw.nbytes), "nothing is computed"


def turned(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, Inverse]:
    raw = random(rows, columns, dtype=torch.bfloat16)
    now = raw.t().contiguous()
    inverse = way_back(raw, now)
    assert inverse is not None
    return raw, now, inverse


def memory_of(raw: torch.Tensor, now: torch.Tensor, inverse: Inverse) -> tuple[ComputedMemory, Scratch, TensorHolding]:
    holding = hold({"w": raw}, ModelIdentity(), block_bytes=2048)
    scratch = Scratch(CPU)
    weak = TensorMemory(holding.announcement.manifest, [now], CPU, weak=True)
    return ComputedMemory(weak, {0: inverse}, scratch), scratch, holding


def test_a_block_computes_its_own_elements_only(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, now, inverse = turned(50, 100)
    memory, _, holding = memory_of(raw, now, inverse)
    read = Scratch.read
    sizes: list[int] = []

    def counted(self: Scratch, tensor: torch.Tensor, way: Inverse, box: module._Box, out: torch.Tensor) -> None:
        sizes.append(out.nbytes)
        read(self, tensor, way, box, out)

    monkeypatch.setattr(Scratch, "read", counted)
    plan = holding.announcement.plan
    for view in memory.views(plan, range(len(plan.blocks))):
        sizes.clear()
        view.regions()
        view.tensors()
        assert sum(sizes) == view.nbytes


def test_a_view_owns_what_is_computed_and_counts_it_until_it_is_freed() -> None:
    raw, now, inverse = turned(64, 64)
    memory, scratch, holding = memory_of(raw, now, inverse)
    plan = holding.announcement.plan
    views = memory.views(plan, range(len(plan.blocks)))
    assert scratch.owned == 0, "nothing is computed before a transport asks"
    threads = [threading.Thread(target=views[0].regions) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scratch.owned == views[0].nbytes, "once, for all threads"
    for view in views:
        view.buffers()
    assert scratch.owned == raw.nbytes
    now.zero_()
    assert b"".join(bytes(view.buffers()[0]) for view in views) == raw.view(torch.uint8).numpy().tobytes()
    del views, view
    gc.collect()
    assert scratch.owned == 0


def test_a_tensor_that_vanished_or_was_given_other_memory_is_gone() -> None:
    raw, now, inverse = turned(64, 64)
    now = torch.nn.Parameter(now)
    memory, _, holding = memory_of(raw, now, inverse)
    plan = holding.announcement.plan
    assert memory.missing(plan, [0, 1]) == {}
    (view,) = memory.views(plan, [0])
    kept = now.data
    now.data = torch.zeros(64, 64, dtype=torch.bfloat16)
    assert "was given other memory" in memory.missing(plan, [1])[1]
    with pytest.raises(ManifestError, match="given other memory"):
        memory.views(plan, [0])
    assert bytes(view.buffers()[0]) == raw.view(torch.uint8).flatten()[:2048].numpy().tobytes(), "was asked before"
    now.data = kept
    assert memory.missing(plan, [0]) == {}
    del now
    assert "was dropped" in memory.missing(plan, [0])[0]
    with pytest.raises(ManifestError, match="dropped"):
        memory.views(plan, [0])


def test_a_tensor_that_was_given_other_memory_after_the_check_is_not_computed_from() -> None:
    """The view says how the old memory is read."""
    raw, now, _ = turned(64, 64)
    now = torch.nn.Parameter(now)
    memory = TensorMemory(hold({"w": raw}, ModelIdentity()).announcement.manifest, [now], CPU, weak=True)
    assert memory.detached(0).data_ptr() == now.data_ptr()
    now.data = torch.zeros(64, 64, dtype=torch.bfloat16)
    with pytest.raises(ManifestError, match="w is gone: it was given other memory"):
        memory.detached(0)
    del now
    with pytest.raises(ManifestError, match="w is gone: it was dropped"):
        memory.detached(0)


def test_memory_that_became_smaller_is_not_read_past_its_end() -> None:
    raw, now, inverse = turned(64, 64)
    block = hold({"w": raw}, ModelIdentity(), block_bytes=2048).announcement.plan.blocks[1]
    view = ComputedBlock(block, [(now, inverse)], Scratch(CPU))
    now.untyped_storage().resize_(100)
    with pytest.raises(ManifestError, match="less memory than it had"):
        view.tensors()
    assert now.untyped_storage().nbytes() == 100


def test_a_rewrite_in_place_shows_in_the_digests() -> None:
    raw, now, inverse = turned(64, 64)
    memory, _, holding = memory_of(raw, now, inverse)
    known = holding.announcement
    now[3, 40] += 1
    found = digest_plan(memory, known.plan, known.algorithm, threads=1)
    places = range(0, len(found), DIGEST_BYTES)
    wrong = [at for at in places if found[at : at + DIGEST_BYTES] != known.digests[at : at + DIGEST_BYTES]]
    assert len(wrong) == 1


def test_computations_wait_while_they_are_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = Scratch(CPU)
    monkeypatch.setattr(module, "_PAUSED_SECONDS", 0.01)
    with scratch.paused(), pytest.raises(ManifestError, match="does not end"), scratch.paused():
        raise AssertionError("two at once")
    with scratch.paused():
        pass


@dataclass(frozen=True)
class Served:
    announcement: Announcement
    memory: ComputedMemory
    device: str = "cpu"


@pytest.mark.parametrize("transport", ["tcp", "shm", "gloo", "memory"])
async def test_clients_get_computed_blocks_and_each_call_owns_few_of_them(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients, limit, block = 3, 64 << 10, 16 << 10
    raw = random(1024, 2048, dtype=torch.bfloat16)
    now = raw.t().contiguous()
    inverse = way_back(raw, now)
    assert inverse is not None
    known = (await in_thread(partial(hold, {"w": raw}, ModelIdentity(model="m"), block_bytes=block))).announcement
    scratch = Scratch(CPU)
    memory = ComputedMemory(TensorMemory(known.manifest, [now], CPU, weak=True), {0: inverse}, scratch)
    assert memory.call_bytes == module.CALL_BYTES
    memory.call_bytes = limit
    most: list[int] = [0]
    made = scratch.host_bytes

    def watched(nbytes: int) -> torch.Tensor:
        found = made(nbytes)
        most[0] = max(most[0], scratch.owned)
        return found

    monkeypatch.setattr(scratch, "host_bytes", watched)
    pulled = [torch.zeros_like(raw) for _ in range(clients)]
    async with netloader.Server(host="127.0.0.1", transport=transport, fan_out=0) as server:
        server.add(Served(known, memory))
        async with anyio.create_task_group() as group:
            for into in pulled:
                source = [f"127.0.0.1:{server.port}"]
                pull = partial(netloader.pull, {"w": into}, ModelIdentity(model="m"), sources=source)
                group.start_soon(partial(pull, transport=transport))
    assert all(torch.equal(into, raw) for into in pulled)
    assert limit < most[0] <= clients * 3 * (limit + block) < raw.nbytes
    gc.collect()
    assert scratch.owned == 0
