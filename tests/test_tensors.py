"""Describing tensors, and blocks in their memory."""

from __future__ import annotations

import gc
import mmap
import sys
import threading
import warnings
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netloader.core.identity import ModelIdentity
from netloader.core.manifest import ITEM_BYTES, MAX_NAME, Manifest, TensorSpec, compare, is_dense
from netloader.core.plan import MIN_BLOCK_BYTES, make_plan
from netloader.errors import LocalProtocolError, ManifestError, TransportUnavailable
from netloader.tensors import DTYPES, MemoryBlock, TensorMemory, describe, destination, hold
from tests.tensor_sets import Sketch, build, copy_blocks, differing, memory_bytes, sketches

BLOCK_SIZES = st.sampled_from([MIN_BLOCK_BYTES, 4096, 1 << 20])


def problems_of(tensors: dict[str, torch.Tensor], *, writable: bool = False) -> tuple[str, ...]:
    with pytest.raises(ManifestError) as caught:
        describe(tensors, writable=writable)
    return caught.value.problems


def only_problem(tensor: object) -> str:
    (problem,) = problems_of({"fine": torch.ones(3), "odd": tensor})  # type: ignore[dict-item]
    assert problem.startswith("odd: ")
    return problem


def test_every_dtype_of_the_manifest_is_in_this_torch_with_its_size() -> None:
    assert set(DTYPES) == set(ITEM_BYTES)
    for name, dtype in DTYPES.items():
        assert dtype.itemsize == ITEM_BYTES[name]


@given(sketch=sketches(), block_bytes=BLOCK_SIZES)
def test_blocks_cover_every_byte_exactly_once(sketch: list[Sketch], block_bytes: int) -> None:
    tensors = build(sketch, seed=1)
    manifest, memory = describe(tensors)
    manifest.check()
    assert [spec.name for spec in manifest.tensors] == list(tensors)
    plan = make_plan(manifest, block_bytes)
    seen: Counter[int] = Counter()
    for view in memory.views(plan, range(len(plan.blocks))):
        assert view.nbytes == sum(len(b) for b in view.buffers()) == sum(t.numel() for t in view.tensors())
        for tensor, buffer in zip(view.tensors(), view.buffers(), strict=True):
            assert (tensor.dtype, tensor.dim(), tensor.is_contiguous()) == (torch.uint8, 1, True)
            assert not buffer.readonly
            assert (buffer.format, buffer.itemsize) == ("B", 1)
            assert tensor.numpy().tobytes() == buffer.tobytes()
            seen.update(range(tensor.data_ptr(), tensor.data_ptr() + tensor.numel()))
    owned: Counter[int] = Counter()
    for tensor in {id(t): t for t in tensors.values()}.values():
        owned.update(range(tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()))
    assert seen == owned


@given(sketch=sketches())
def test_a_set_is_described_like_its_tensors_one_by_one(sketch: list[Sketch]) -> None:
    tensors = build(sketch, seed=1)
    manifest, memory = describe(tensors)
    assert manifest.sizes == tuple(spec.wire_bytes for spec in manifest.tensors)
    assert Manifest(manifest.tensors).sizes == manifest.sizes
    for spec, (name, tensor) in zip(manifest.tensors, tensors.items(), strict=True):
        (alone,) = describe({name: tensor})[0].tensors
        assert alone == TensorSpec(spec.name, spec.dtype, spec.shape, spec.stride, spec.format)
        assert DTYPES[spec.dtype] == tensor.dtype
        assert spec.shape == tuple(tensor.shape)
        if spec.alias_of:
            assert tensors[spec.alias_of].data_ptr() == tensor.data_ptr()
    assert memory.device == "cpu"


@given(sketch=sketches(), odd=st.integers(0, 6))
def test_one_unusual_tensor_does_not_change_the_description_of_others(sketch: list[Sketch], odd: int) -> None:
    tensors: dict[str, Any] = dict(build(sketch, seed=1))
    whole = torch.zeros(8)
    strange: dict[str, Any] = {
        "sparse": torch.ones(3).to_sparse(),
        "meta": torch.empty(3, device="meta"),
        "conj": torch.ones(3, dtype=torch.complex64).conj(),
        "negative": torch.ones(3, dtype=torch.complex64).conj().imag,
        "rows": torch.ones(4, 4)[:, :2],
        "none": None,
        "bits": torch.empty(3, dtype=torch.bits8),
    }
    name = list(strange)[odd]
    found = problems_of({"odd": strange[name], **tensors, "whole": whole, "part": whole[2:4]})
    assert [line.split(":")[0] for line in found] == ["odd", "part"]


@given(sketch=sketches(), block_bytes=BLOCK_SIZES, together=st.integers(1, 4), data=st.data())
def test_the_batch_size_of_checks_makes_no_difference(
    sketch: list[Sketch], block_bytes: int, together: int, data: st.DataObject
) -> None:
    tensors = build(sketch, seed=1)
    manifest, memory = describe(tensors)
    plan = make_plan(manifest, block_bytes)
    numbers = range(len(plan.blocks))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("describe", "memory"):
            patch.setattr(sys.modules[f"netloader.tensors.{module}"], "BATCH_TENSORS", together)
        again, looked = describe(tensors)
        assert again == manifest
        for _ in range(2):  # the second time with results of the first
            views = looked.views(plan, numbers)
            assert [view.number for view in views] == list(numbers)
            assert [view.regions() for view in views] == [view.regions() for view in memory.views(plan, numbers)]
            assert looked.missing(plan, numbers) == {}
        fillable = [name for name, tensor in tensors.items() if tensor.numel() and not tensor.is_inference()]
        if fillable:
            replaced = tensors[data.draw(st.sampled_from(fillable))]
            replaced.data = replaced.detach().clone()
            lost = looked.missing(plan, numbers)
            assert set(lost) == {n for n in numbers if any(replaced is tensors[t] for t in plan.tensors_of(n))}
            kept = [number for number in numbers if number not in lost]
            assert len(looked.views(plan, kept)) == len(kept)


@given(sketch=sketches(), block_bytes=BLOCK_SIZES, seed=st.integers(0, 5))
def test_copying_every_block_makes_two_sets_bit_equal(sketch: list[Sketch], block_bytes: int, seed: int) -> None:
    source, target = build(sketch, seed=seed), build(sketch, seed=None)
    ours, memory = describe(source)
    filled = destination(target)
    assert filled.manifest is not None
    assert compare(filled.manifest, ours) == ()
    copy_blocks(memory, filled.memory, make_plan(ours, block_bytes))
    assert differing(source, target) == []
    assert list(filled.tensors) == list(source)


@given(sketch=sketches(), block_bytes=BLOCK_SIZES, seed=st.integers(0, 5))
def test_a_destination_without_tensors_becomes_the_same_set(sketch: list[Sketch], block_bytes: int, seed: int) -> None:
    source = build(sketch, seed=seed)
    manifest, memory = describe(source)
    filled = destination(None)
    assert filled.manifest is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        filled.adopt(manifest)
    plan = make_plan(manifest, block_bytes)
    copy_blocks(memory, filled.memory, plan)
    assert filled.views(plan, []) == []
    assert list(filled.tensors) == list(source)
    for spec in manifest.tensors:
        tensor = filled.tensors[spec.name]
        assert memory_bytes(tensor) == memory_bytes(source[spec.name])
        assert tensor.shape == source[spec.name].shape
        if spec.alias_of:
            assert tensor is filled.tensors[spec.alias_of]
    assert describe(filled.tensors)[0] == manifest


@given(shape=st.lists(st.integers(1, 4), max_size=4), data=st.data())
def test_a_dense_stride_is_recorded_only_when_it_matters(shape: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    tensor = torch.empty(shape).permute(order)
    (spec,) = describe({"w": tensor})[0].tensors
    assert (spec.stride == ()) == tensor.is_contiguous()
    assert not spec.stride or is_dense(spec.shape, spec.stride)


def test_strides_of_single_dimensions_are_no_difference() -> None:
    left = torch.empty(1, 4, 5).transpose(1, 2)
    right = torch.empty_strided((1, 5, 4), (77, 1, 5))
    assert left.stride() != right.stride()
    assert describe({"w": left})[0] == describe({"w": right})[0]


def test_tied_tensors_are_transferred_once() -> None:
    weight = torch.nn.Parameter(torch.randn(10, 20))
    manifest, _ = describe({"embed": weight, "norm": torch.ones(3), "head": weight, "copy": weight.detach()})
    assert [spec.alias_of for spec in manifest.tensors] == ["", "", "embed", "embed"]
    assert manifest.nbytes == weight.nbytes + 12


def test_an_empty_set_has_an_empty_manifest() -> None:
    manifest, memory = describe({})
    assert manifest == Manifest(())
    assert memory.views(make_plan(manifest, 4096), []) == []
    assert memory.device == "cpu"


def test_empty_tensors_are_no_aliases_of_each_other() -> None:
    manifest, _ = describe({"a": torch.empty(0), "b": torch.empty(0), "c": torch.empty(0, 4)})
    assert [spec.alias_of for spec in manifest.tensors] == ["", "", ""]


class Hidden(torch.Tensor):
    """A class that handles every operation itself, as in quantisation libraries."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError("described by running operations")


class Hooked(torch.nn.Parameter):
    """A parameter that intercepts every operation, as in engines."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("described through a hook")


class Labelled(torch.nn.Parameter):
    """A parameter with attributes, as in engines."""


def test_a_plain_subclass_is_described_like_a_tensor() -> None:
    manifest, _ = describe({"w": Labelled(torch.ones(3)), "b": torch.nn.Buffer(torch.ones(2))})
    assert [spec.shape for spec in manifest.tensors] == [(3,), (2,)]


def test_hooks_of_tensor_classes_are_not_called() -> None:
    turned = Hooked(torch.ones(4, 5).t())
    manifest, memory = describe({"w": Hooked(torch.ones(3)), "t": turned, "tied": turned})
    assert [(spec.stride, spec.alias_of) for spec in manifest.tensors] == [((), ""), ((1, 5), ""), ((1, 5), "t")]
    assert describe({"t": turned})[0].tensors[0].stride == (1, 5)
    plan = make_plan(manifest, 4096)
    assert memory.missing(plan, [0]) == {}
    assert memory.views(plan, [0])[0].buffers()[0].tobytes() == torch.ones(3).numpy().tobytes()


def test_tensors_that_cannot_be_transferred_are_refused_with_the_reason() -> None:
    hidden = torch.Tensor._make_wrapper_subclass(Hidden, (3,))
    assert "stride (0, 1)" in only_problem(torch.ones(3).expand(4, 3))
    assert "stride (4, 1)" in only_problem(torch.ones(4, 4)[:, :2])
    assert "layout is torch.sparse_coo" in only_problem(torch.ones(3).to_sparse())
    assert "meta device" in only_problem(torch.empty(3, device="meta"))
    assert "NoneType" in only_problem(None)
    assert "Hidden keeps its data elsewhere" in only_problem(hidden)
    assert "uninitialised" in only_problem(torch.nn.UninitializedParameter())
    assert "uninitialised" in only_problem(torch.nn.UninitializedBuffer())
    assert "conjugate" in only_problem(torch.ones(3, dtype=torch.complex64).conj())
    assert "negative" in only_problem(torch.ones(3, dtype=torch.complex64).conj().imag)
    assert "dtype torch.bits8" in only_problem(torch.empty(3, dtype=torch.bits8))
    assert "no memory" in only_problem(torch._efficientzerotensor((3,)))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quantised_tensor_is_refused_by_its_dtype() -> None:
    assert "dtype torch.qint8" in only_problem(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))


def test_a_fake_tensor_is_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(3)
    assert "FakeTensor keeps its data elsewhere" in only_problem(fake)


def test_a_tensor_inside_a_transformation_is_refused() -> None:
    found = []

    def look(inner: torch.Tensor) -> torch.Tensor:
        found.append(only_problem(inner))
        return inner

    torch.vmap(look)(torch.ones(2, 3))
    assert "cannot be addressed" in found[0]


def test_invalid_names_are_refused() -> None:
    found = problems_of({"": torch.ones(1), "n" * (MAX_NAME + 1): torch.ones(1), "\ud800": torch.ones(1), 3: 3})  # type: ignore[dict-item]
    assert len(found) == 4
    assert found[0].startswith("'': ")
    assert "this one 1025" in found[1]
    assert "\\ud800" in found[2]
    assert found[3] == "3: a name has to be text"
    describe({"n" * MAX_NAME: torch.ones(1), "schicht.gewicht.ä": torch.ones(1)})


def test_all_problems_are_named_at_once() -> None:
    weight = torch.ones(10, 10)
    found = problems_of(
        {
            "weight": weight,
            "sparse": torch.ones(3).to_sparse(),
            "rows": weight[2:4],
            "other_type": weight.view(torch.int32),
            "meta": torch.empty(3, device="meta"),
        }
    )
    assert [line.split(":")[0] for line in found] == ["sparse", "meta", "other_type", "rows"]
    assert "overlaps that of weight" in found[2]
    assert "overlaps that of weight" in found[3]


def test_a_tensor_inside_a_larger_one_is_detected_behind_smaller_ones() -> None:
    memory = torch.zeros(100)
    found = problems_of({"all": memory, "first": memory[10:20], "second": memory[30:40]})
    assert [line.split(":")[0] for line in found] == ["first", "second"]


def test_adjacent_tensors_in_one_storage_are_accepted() -> None:
    memory = torch.zeros(100)
    manifest, _ = describe({"right": memory[50:], "left": memory[:50]})
    assert manifest.nbytes == 400


def test_tensors_on_several_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # There is no second device here, so properties of a tensor class simulate one.
    class Elsewhere(torch.nn.Parameter):
        device = torch.device("cuda:1")
        is_cpu = False

    found = problems_of({"a": torch.ones(1), "b": torch.ones(1), "c": Elsewhere(torch.ones(1))})
    assert found == ("c: it is on cuda:1, 2 others are on cpu",)


def read_only_tensor() -> tuple[torch.Tensor, mmap.mmap]:
    mapping = mmap.mmap(-1, 1 << 16, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.frombuffer(mapping, dtype=torch.uint8), mapping


def test_read_only_memory_is_served_but_never_filled() -> None:
    locked, _mapping = read_only_tensor()
    tensors = {"before": torch.ones(100), "locked": locked[4096:8192], "more": locked[8192:], "after": torch.ones(9)}
    with pytest.raises(ManifestError, match="cannot be filled") as caught:
        destination(tensors)
    assert sorted(caught.value.problems) == ["locked: its memory is read-only", "more: its memory is read-only"]
    holding = hold(tensors, ModelIdentity())
    assert holding.device == "cpu"


def test_a_manifest_that_cannot_be_allocated_here_is_refused() -> None:
    manifest = Manifest((TensorSpec("w", "float32", (3,), format="nz"), TensorSpec("v", "float32", (3,))))
    target = destination(None)
    with pytest.raises(ManifestError, match="w: memory format nz"):
        target.adopt(manifest)
    huge = Manifest((TensorSpec("w", "float32", (1 << 60,)),))
    with pytest.raises(ManifestError, match="no memory on cpu for w"):
        target.adopt(huge)
    with pytest.raises(LocalProtocolError, match="no memory yet"):
        target.views(make_plan(Manifest(()), 4096), [])
    target.adopt(Manifest(()))
    with pytest.raises(LocalProtocolError, match="tensors already"):
        target.adopt(Manifest(()))


def test_writing_to_a_parameter_is_not_recorded_by_autograd() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1000))
    loss = (parameter * parameter).sum()
    manifest, memory = describe({"w": parameter})
    (view,) = memory.views(make_plan(manifest, 4096), [0])
    view.tensors()[0].fill_(0)
    view.buffers()[0][:] = bytes(4000)
    loss.backward()  # type: ignore[no-untyped-call]  # would complain about a saved tensor that was modified in place
    assert parameter._version == 0


def weak_pair() -> tuple[torch.nn.Parameter, TensorMemory, Manifest]:
    parameter = torch.nn.Parameter(torch.full((1000,), 7.0))
    manifest, memory = describe({"norm": torch.nn.Parameter(torch.ones(1)), "w": parameter}, weak=True)
    return parameter, memory, manifest


def test_a_dropped_tensor_is_missing_by_name() -> None:
    parameter, memory, manifest = weak_pair()
    plan = make_plan(manifest, 2000)
    assert memory.missing(plan, range(3)) == {2: "norm was dropped by its owner"}
    (view,) = memory.views(plan, [1])
    reference = weakref.ref(parameter)
    del parameter
    gc.collect()
    assert reference() is None
    assert memory.missing(plan, [1]) == {1: "w was dropped by its owner"}
    with pytest.raises(ManifestError, match="block 1 is gone: w was dropped by its owner"):
        memory.views(plan, [1])
    # What was handed out before stays readable.
    assert view.tensors()[0].numpy().tobytes() == torch.full((500,), 7.0).numpy().tobytes()


def test_replaced_memory_is_never_used_by_its_old_address() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1000))
    manifest, memory = describe({"w": parameter})
    plan = make_plan(manifest, 4096)
    (view,) = memory.views(plan, [0])
    parameter.data = torch.ones(1000)
    assert memory.missing(plan, [0]) == {0: "w was given other memory"}
    with pytest.raises(ManifestError, match="w was given other memory"):
        memory.views(plan, [0])
    buffers = view.buffers()
    del view
    gc.collect()
    buffers[0][:] = bytes(4000)  # the old memory lives as long as its views
    assert parameter.sum().item() == 1000


def test_a_repeated_check_detects_changes_since_the_first() -> None:
    """A server caches the results of checks of a block's memory; every use checks that they still hold."""
    tensor = torch.zeros(1000)
    parameter = torch.nn.Parameter(torch.zeros(1000))
    manifest, memory = describe({"w": tensor, "p": parameter})
    plan = make_plan(manifest, 4096)
    first = memory.views(plan, [0, 1])
    assert [view.regions() for view in memory.views(plan, [0, 1])] == [view.regions() for view in first]
    assert memory.missing(plan, [0]) == {}
    storage = tensor.untyped_storage()
    storage.resize_(0)
    assert [*memory.missing(plan, [0])] == [0]
    with pytest.raises(ManifestError, match="block 0 is gone"):
        memory.views(plan, [0])
    kept = weakref.ref(parameter.untyped_storage())
    parameter.data = torch.ones(1000)
    del first
    assert [*memory.missing(plan, [0, 1])] == [0, 1]
    assert memory.missing(plan, [1]) == {1: "p was given other memory"}
    gc.collect()
    assert kept() is None, "the server lets go of what was replaced"
    other = make_plan(manifest, 8192)
    assert [*memory.missing(other, [0])] == [0]


def test_a_repeated_check_of_many_blocks_names_the_changed_one() -> None:
    parameters = {f"p{n}": torch.nn.Parameter(torch.zeros(1024)) for n in range(5)}
    manifest, memory = describe(parameters)
    plan = make_plan(manifest, 4096)
    numbers = range(len(plan.blocks))
    memory.views(plan, numbers)
    assert memory.missing(plan, numbers) == {}
    parameters["p3"].data = torch.ones(1024)
    assert memory.missing(plan, numbers) == {3: "p3 was given other memory"}
    with pytest.raises(ManifestError, match="block 3 is gone: p3 was given other memory"):
        memory.views(plan, numbers)
    assert len(memory.views(plan, [0, 1, 2, 4])) == 4


def test_a_storage_that_shrank_is_detected_although_its_address_is_the_same() -> None:
    tensor = torch.zeros(1000)
    manifest, memory = describe({"w": tensor})
    plan = make_plan(manifest, 4096)
    memory.views(plan, [0])
    kept = memory._cache[1][0]
    memory._cache[1][0] = kept._replace(sizes=[size + 1 for size in kept.sizes])  # as if it had been larger
    assert memory.missing(plan, [0]) == {}, "looked at again, and large enough"
    short = torch.zeros(100)
    memory._addresses[0], memory._tensors[0] = short.data_ptr(), short
    memory._cache[1][0] = kept._replace(storages=[short.untyped_storage()], sizes=[4000], begins=[short.data_ptr()])
    assert memory.missing(plan, [0]) == {0: "w has less memory than it had"}


def test_replaced_memory_is_detected_directly_after_the_previous_check() -> None:
    parameter = torch.nn.Parameter(torch.arange(2048.0))
    manifest, memory = describe({"w": parameter})
    plan = make_plan(manifest, 4096)
    memory.views(plan, [0, 1])
    assert memory.missing(plan, [0]) == {}
    parameter.data = torch.zeros(2048)
    with pytest.raises(ManifestError, match="block 0 is gone: w was given other memory"):
        memory.views(plan, [0])


def test_freed_memory_is_detected_at_once() -> None:
    tensor = torch.zeros(1000)
    manifest, memory = describe({"w": tensor})
    plan = make_plan(manifest, 4096)
    memory.views(plan, [0])
    assert memory.missing(plan, [0]) == {}
    tensor.untyped_storage().resize_(0)
    with pytest.raises(ManifestError, match="block 0 is gone: w was given other memory"):
        memory.views(plan, [0])


def test_memory_that_shrank_is_never_read_past_its_end() -> None:
    memory = torch.zeros(1000)
    manifest, described = describe({"first": memory[:10], "last": memory[500:]})
    plan = make_plan(manifest, 1024)
    last = next(n for n, block in enumerate(plan.blocks) if block.spans[0].tensor == 1)
    assert described.missing(plan, [last]) == {}
    held = TensorMemory(manifest, [memory[:10], memory[500:600]], torch.device("cpu"))
    assert held.missing(plan, [last]) == {}  # the storage is what counts, and it is all there
    short = torch.zeros(600)
    held = TensorMemory(manifest, [short[:10], short[500:]], torch.device("cpu"))
    assert held.missing(plan, [last]) == {last: "last has less memory than it had"}
    with pytest.raises(ManifestError, match=f"block {last} is gone: last has less memory than it had"):
        held.views(plan, [last])


def test_a_plan_for_other_tensors_is_refused() -> None:
    manifest, memory = describe({"w": torch.ones(1000)})
    other, _ = describe({"w": torch.ones(1001)})
    with pytest.raises(ManifestError, match="other tensors"):
        memory.views(make_plan(other, 4096), [0])
    with pytest.raises(ManifestError, match="other tensors"):
        memory.missing(make_plan(other, 4096), [0])
    equal, _ = describe({"w": torch.ones(1000)})
    assert memory.views(make_plan(equal, 4096), [0])[0].nbytes == 4000
    assert manifest == equal


def test_device_memory_has_no_byte_views() -> None:
    manifest, _ = describe({"w": torch.ones(10)})
    memory = TensorMemory(manifest, [torch.empty(10, device="meta")], torch.device("meta"))
    (view,) = memory.views(make_plan(manifest, 4096), [0])
    assert isinstance(view, MemoryBlock)
    with pytest.raises(TransportUnavailable, match="block 0 is on meta"):
        view.buffers()
    assert repr(view) == "<block 0: 40 bytes in 1 spans on meta>"


def test_views_are_made_in_any_thread_and_mode() -> None:
    with torch.inference_mode():
        tensors = {"w": torch.arange(1000)}
    manifest, memory = describe(tensors)
    plan = make_plan(manifest, 2048)
    read: list[bytes] = []

    def work() -> None:
        for view in memory.views(plan, range(len(plan.blocks))):
            view.tensors()[0].add_(0)
            read.append(b"".join(view.buffers()))

    thread = threading.Thread(target=work, name="netloader-test")
    thread.start()
    thread.join()
    assert b"".join(read) == memory_bytes(tensors["w"])
