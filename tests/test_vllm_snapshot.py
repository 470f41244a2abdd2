"""The parts of the vLLM adapter that need torch and no vLLM."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from netloader import tensors
from netloader.config import Config
from netloader.core.identity import ModelIdentity
from netloader.errors import ManifestError
from netloader.vllm.model import copies
from netloader.vllm.model.agreement import REPORT_BYTES, Report, disagreement, load_digest
from netloader.vllm.model.copies import Keep, is_full
from netloader.vllm.model.digest import digest_of
from netloader.vllm.model.initial_values import InitialValues, NotRestored
from netloader.vllm.model.load_state import apply_load_state, load_state_of
from netloader.vllm.model.plain_state import PlainState
from netloader.vllm.model.snapshot import ALWAYS_COPIED_BYTES, Located, RawWeights, UnnamedTensors, named_raw_tensors
from netloader.vllm.serve.address_file import AddressFile, AddressFileError
from netloader.vllm.serve.raw_holding import RawHolding, raw_holding
from netloader.vllm.serve.retention import copy_log_lines, hint_for, keep_policy, kept_text
from netloader.vllm.serve.serving import check_unchanged


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(64, 64)
        self.head = torch.nn.Linear(64, 64, bias=False)
        self.head.weight = self.embed.weight
        self.up = torch.nn.Linear(64, 128)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("cache", torch.arange(8.0), persistent=False)
        self.has_own_lm_head = False


def recorded(model: torch.nn.Module, keep: Callable[[str], Keep]) -> RawWeights:
    """What a load records of a model. The blocks are small, so that each larger tensor has blocks of its own."""
    holding = tensors.hold(named_raw_tensors(model), ModelIdentity(), block_bytes=8192)
    return RawWeights(model, holding.announcement, keep)


def test_raw_tensors_have_all_their_names_and_computed_caches_are_left_out() -> None:
    names = list(named_raw_tensors(Tiny()))
    assert names == ["scale", "embed.weight", "head.weight", "up.weight", "up.bias"]


def test_modules_in_plain_containers_have_names_by_their_path() -> None:
    model: Any = Tiny()
    shared = torch.nn.Linear(2, 2, bias=False)
    model.up.by_task = {"embed": torch.nn.Sequential(torch.nn.Linear(2, 3)), "classify": [shared]}
    model.up.sideways = [model.embed]  # has its registered name only
    model.holder = SimpleNamespace(head=shared)
    model.holder.later = torch.nn.UninitializedBuffer()
    names = list(named_raw_tensors(model))
    assert names[:5] == list(named_raw_tensors(Tiny()))
    assert names[5:] == [
        "holder.head.weight",
        "up.by_task[embed].0.weight",
        "up.by_task[embed].0.bias",
    ]


def test_loading_that_fills_or_adds_a_tensor_without_a_name_is_noticed() -> None:
    model: Any = Tiny()
    model.up.tables = {"a": torch.zeros(3), "b": torch.zeros(3)}
    hidden = torch.ones(2)
    model.up.rescale = lambda tensor: tensor * hidden
    model.up.later = [torch.nn.UninitializedBuffer()]
    before = UnnamedTensors(model)
    with torch.no_grad():
        model.up.weight.fill_(3)  # a weight with a name is not compared here
    assert before.changed_by_loading(model) == []
    model.up.tables["b"].data.copy_(torch.ones(3))
    hidden.mul_(2)
    model.cache.add_(1)
    model.up.added = torch.zeros(1)
    assert before.changed_by_loading(model) == ["cache", "up.added", "up.rescale<closure>.hidden", "up.tables[b]"]


def test_an_unchanged_tensor_is_live_and_a_replaced_one_is_kept() -> None:
    model = Tiny()
    before = {name: tensor.detach().clone() for name, tensor in named_raw_tensors(model).items()}
    raw = recorded(model, lambda _: Keep.REFERENCE)
    model.up.weight = torch.nn.Parameter(model.up.weight.detach().flip(0).contiguous())
    located = raw.locate(model)
    assert located.lost == {}
    assert set(located.kept) == {"up.weight"}
    assert torch.equal(located.kept["up.weight"], before["up.weight"])
    assert located.kept_bytes == before["up.weight"].nbytes
    assert kept_text(located) == f"originals kept: KEEP_RAW: {64 * 128 * 4} bytes on cpu (false frees them)"
    assert set(located.live) == set(before) - {"up.weight"}


def test_an_original_that_was_not_kept_is_lost() -> None:
    model = Tiny()
    raw = recorded(model, lambda _: Keep.NO)
    del model.up.weight
    located = raw.locate(model)
    assert located.lost == {"up.weight": "vLLM dropped it"}
    assert "up.bias" in located.live, "small tensors are always copied"


def test_another_name_of_a_tensor_is_not_called_rewritten_because_its_block_cannot_be_hashed() -> None:
    model = Tiny()
    holding = tensors.hold(named_raw_tensors(model), ModelIdentity(), block_bytes=1 << 20)
    raw = RawWeights(model, holding.announcement, lambda name: Keep.NO)
    model.up.weight = torch.nn.Parameter(torch.zeros(128, 64))
    located = raw.locate(model)
    assert located.lost == {"up.weight": "vLLM replaced it"}
    assert not {"embed.weight", "head.weight"} & located.live.keys()  # neither is known to be unchanged


def test_a_rewrite_in_place_is_seen() -> None:
    model = Tiny()
    raw = recorded(model, lambda _: Keep.REFERENCE)
    model.embed.weight.data[3, 5] += 1
    located = raw.locate(model)
    assert located.lost == {
        "embed.weight": "vLLM rewrote it in place",
        "head.weight": "vLLM rewrote it in place",
    }


def replace(model: Any, name: str, values: torch.Tensor) -> None:
    """Give a parameter other memory, as post-processing does."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, torch.nn.Parameter(values, requires_grad=False))


def served(raw: RawWeights, located: Located) -> RawHolding:
    return raw_holding(raw.announcement, raw.device, located, "ab" * 16)


@pytest.mark.parametrize("keep", [Keep.NO, Keep.REFERENCE, Keep.COPY])
def test_what_can_be_computed_back_needs_no_original(keep: Keep) -> None:
    model = Tiny()
    raw = recorded(model, lambda _: keep)
    original = weakref.ref(model.up.weight.untyped_storage())
    replace(model, "up.weight", model.up.weight.detach().t().contiguous())
    located = raw.locate(model)
    assert (located.lost, located.kept) == ({}, {})
    assert located.inverses["up.weight"].steps == ("transpose",)
    assert kept_text(located) == "1 tensor computed from processed ones"
    assert raw.originals() == {}
    gc.collect()
    assert original() is None, "KEEP_RAW's reference and its copy are freed"
    check_unchanged(served(raw, located))


@pytest.mark.parametrize("keep", [Keep.DRAM, Keep.HBM])
def test_a_copy_that_int8_cache_asks_for_is_served_although_it_could_be_computed(keep: Keep) -> None:
    model = Tiny()
    raw = recorded(model, lambda _: keep)
    replace(model, "up.weight", model.up.weight.detach().t().contiguous())
    located = raw.locate(model)
    assert set(located.kept) == {"up.weight"}
    assert located.inverses == {}


@pytest.mark.parametrize(("keep", "place"), [(Keep.NO, ""), (Keep.REFERENCE, "kept"), (Keep.COPY, "kept")])
def test_what_only_looks_right_is_never_served(keep: Keep, place: str) -> None:
    """The samples are equal, but an element between them is not: the digests show it."""
    model = Tiny()
    raw = recorded(model, lambda _: keep)
    changed = model.up.weight.detach().t().contiguous()
    changed[3, 20] += 1
    replace(model, "up.weight", changed)
    located = raw.locate(model)
    assert located.inverses == {}
    if place:
        assert set(located.kept) == {"up.weight"}
        check_unchanged(served(raw, located))
    else:
        assert located.lost == {"up.weight": "vLLM replaced it"}


def test_square_weights_that_were_transposed_are_not_taken_for_raw() -> None:
    model = Tiny()
    raw = recorded(model, lambda _: Keep.NO)
    for name in ("embed.weight", "up.weight"):
        replace(model, name, model.get_parameter(name).detach().t().contiguous())
    model.head.weight = model.embed.weight
    located = raw.locate(model)
    assert located.lost == {}
    assert {name: way.steps for name, way in located.inverses.items()} == dict.fromkeys(
        ["embed.weight", "head.weight", "up.weight"], ("transpose",)
    )
    check_unchanged(served(raw, located))


def test_the_same_bytes_under_another_shape_are_served_where_they_are() -> None:
    model = Tiny()
    raw = recorded(model, lambda _: Keep.NO)
    replace(model, "up.weight", model.up.weight.detach().t())
    replace(model, "embed.weight", model.embed.weight.detach().clone().view(-1))
    model.head.weight = model.embed.weight
    located = raw.locate(model)
    assert (located.lost, located.inverses, located.scratch) == ({}, {}, None)
    holding = served(raw, located)
    assert holding.memory.call_bytes is None
    check_unchanged(holding)


def test_a_tensor_that_others_are_computed_from_may_vanish_or_change() -> None:
    model = Tiny()
    raw = recorded(model, lambda _: Keep.NO)
    replace(model, "up.weight", model.up.weight.detach().t().contiguous())
    holding = served(raw, raw.locate(model))
    assert holding.memory.call_bytes is not None
    check_unchanged(holding)
    model.up.weight.data[5, 7] += 1
    with pytest.raises(ManifestError, match=r"up\.weight is not what it was"):
        check_unchanged(holding)
    model.up.weight.data = model.up.weight.data.clone()
    with pytest.raises(ManifestError, match="given other memory"):
        check_unchanged(holding)
    del model.up
    gc.collect()
    plan = holding.announcement.plan
    gone = {
        name for number in holding.memory.missing(plan, range(len(plan.blocks))) for name in plan.tensors_of(number)
    }
    assert "up.weight" in gone
    assert "embed.weight" not in gone


@given(st.data())
def test_any_mixture_of_changes_is_served_as_it_was_loaded(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=6))
    model = torch.nn.Module()
    for number, shape in enumerate(shapes):
        dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.int8]))
        values = torch.randint(-99, 99, shape, generator=torch.Generator().manual_seed(number)).to(dtype)
        model.register_buffer(f"w{number}", values)
    announcement = tensors.hold(
        named_raw_tensors(model), ModelIdentity(), block_bytes=data.draw(st.integers(1024, 20000))
    ).announcement
    raw = RawWeights(model, announcement, lambda _: data.draw(st.sampled_from([Keep.NO, Keep.REFERENCE, Keep.COPY])))
    changes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda w: w,
        lambda w: w.t(),
        lambda w: w.t().contiguous(),
        lambda w: w.clone().view(-1),
        lambda w: w.float() if w.dtype == torch.bfloat16 else w.t().contiguous(),
        lambda w: w.clone().view(torch.uint8),
    ]
    for name, values in list(model.named_buffers()):
        model.register_buffer(name, data.draw(st.sampled_from(changes))(values))
    located = raw.locate(model)
    assert located.lost == {}
    assert not [name for name, original in located.kept.items() if original.nbytes > ALWAYS_COPIED_BYTES]
    check_unchanged(raw_holding(announcement, "cpu", located, "ab" * 16))


@pytest.mark.parametrize("keep", [Keep.DRAM, Keep.HBM, Keep.COPY])
def test_a_copy_keeps_the_values_after_a_rewrite_and_is_freed_without_one(keep: Keep) -> None:
    model = Tiny()
    before = {name: tensor.detach().clone() for name, tensor in named_raw_tensors(model).items()}
    raw = recorded(model, lambda _: keep)
    assert raw.copies[keep].nbytes == before["embed.weight"].nbytes + before["up.weight"].nbytes + 4 + 128 * 4
    model.embed.weight.data[3, 5] += 1
    located = raw.locate(model)
    assert located.lost == {}
    assert set(located.kept) == {"embed.weight", "head.weight"}
    assert located.kept["head.weight"] is located.kept["embed.weight"], "tied weights are copied once"
    assert torch.equal(located.kept["embed.weight"], before["embed.weight"])
    assert located.costs() == {(keep, "cpu"): before["embed.weight"].nbytes}
    freed = " (false frees them)" if keep is Keep.COPY else ""
    assert kept_text(located) == f"originals kept: {keep.value}: {64 * 64 * 4} bytes on cpu{freed}"
    assert raw.originals() == {}


def test_small_tensors_are_copied_whatever_the_settings() -> None:
    model = Tiny()
    raw = recorded(model, lambda _: Keep.NO)
    model.get_buffer("scale").fill_(7)
    located = raw.locate(model)
    assert located.lost == {}
    assert located.kept["scale"].item() == 1


def test_a_transposed_weight_is_copied_in_its_order() -> None:
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.arange(5000.0).view(50, 100).t())
    raw = recorded(model, lambda _: Keep.DRAM)
    assert raw.originals()["weight"].stride() == (1, 100)
    assert raw.originals()["weight"].data_ptr() != model.weight.data_ptr()


def test_a_copy_without_memory_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensor: torch.Tensor, *, host: bool) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(copies, "_copy", full)
    model = Tiny()
    raw = recorded(model, lambda name: Keep.DRAM if name == "up.weight" else Keep.NO)
    assert ("no memory for copies of up.weight") in "".join(text for _, text in copy_log_lines(raw.copies))
    model.up.weight = torch.nn.Parameter(torch.zeros(128, 64))
    lost = raw.locate(model).lost
    assert "no memory for a copy" in lost["up.weight"]
    assert "more memory" in hint_for(lost, frozenset(), Config())


def test_an_error_that_is_not_about_memory_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_full(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_full(RuntimeError("device-side assert"))

    def broken(tensor: torch.Tensor, *, host: bool) -> torch.Tensor:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(copies, "_copy", broken)
    with pytest.raises(RuntimeError, match="device-side"):
        recorded(Tiny(), lambda _: Keep.HBM)


@pytest.mark.parametrize(
    ("fields", "name", "keep"),
    [
        ({}, "q.weight", Keep.NO),
        ({}, "p.weight", Keep.REFERENCE),
        ({"keep_raw": False}, "p.weight", Keep.NO),
        ({"int8_cache": "dram"}, "q.weight", Keep.DRAM),
        ({"int8_cache": "hbm"}, "q.weight", Keep.HBM),
        ({"int8_cache": "hbm"}, "p.weight", Keep.REFERENCE),
        ({"int8_cache": "dram", "int8_cache_name": ("p.weight",)}, "p.weight", Keep.DRAM),
        ({"int8_cache": "dram", "int8_cache_name": ("p.weight",)}, "q.weight", Keep.NO),
        ({"int8_cache": "dram", "int8_cache_name": ()}, "q.weight", Keep.NO),
        ({"int8_cache": "no", "int8_cache_name": ("q.weight",)}, "q.weight", Keep.NO),
    ],
)
def test_what_the_settings_keep(fields: dict[str, Any], name: str, keep: Keep) -> None:
    assert keep_policy(frozenset({"q"}), Config(**fields))(name) is keep


@pytest.mark.parametrize(
    ("fields", "name", "keep"),
    [
        ({}, "p.weight", Keep.COPY),
        ({}, "other.weight", Keep.REFERENCE),
        ({"keep_raw": False}, "p.weight", Keep.NO),
        ({"int8_cache": "dram", "int8_cache_name": ("p.weight",)}, "p.weight", Keep.DRAM),
        ({}, "q.weight", Keep.NO),
    ],
)
def test_what_may_be_overwritten_is_copied_instead_of_referred_to(
    fields: dict[str, Any], name: str, keep: Keep
) -> None:
    assert keep_policy(frozenset({"q"}), Config(**fields), frozenset({"p", "q"}))(name) is keep


@pytest.mark.parametrize(
    ("lost", "fields", "hint"),
    [
        ({"q.weight": "vLLM replaced it"}, {}, "set INT8_CACHE to dram or hbm on the server"),
        ({"q.weight": "vLLM replaced it"}, {"int8_cache": "hbm", "int8_cache_name": ()}, "add these names"),
        ({"p.weight": "vLLM dropped it"}, {"keep_raw": False}, "set KEEP_RAW to true on the server"),
        ({"p.weight": "there was no memory for a copy"}, {}, "give the host more memory"),
        ({"p.weight": "no memory"}, {"int8_cache": "hbm"}, "more memory, or list fewer names in INT8_CACHE_NAME"),
        ({"p.weight": "vLLM rewrote it in place"}, {}, "list these names in INT8_CACHE_NAME"),
    ],
)
def test_a_refusal_names_the_setting_that_would_help(lost: dict[str, str], fields: dict[str, Any], hint: str) -> None:
    assert hint in hint_for(lost, frozenset({"q"}), Config(**fields))


def test_live_tensors_are_not_kept_alive() -> None:
    model = Tiny()
    located = recorded(model, lambda _: Keep.REFERENCE).locate(model)
    assert located.live["up.weight"]() is model.up.weight
    del model.up
    gc.collect()
    assert located.live["up.weight"]() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_equal_bits_have_equal_digests_whatever_the_strides(dtype: torch.dtype) -> None:
    bits = torch.arange(24, dtype=torch.uint8) % 2
    tensor = bits.view(2, 12).repeat(4, 4).view(dtype)
    assert digest_of(tensor) == digest_of(tensor.t().contiguous().t())
    assert digest_of(tensor) != digest_of(tensor.t().contiguous())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex128]
)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (4, 0)])
def test_initial_values_are_restored_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    uniform, mixed = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    if mixed.numel() > 1:
        mixed.view(torch.uint8).view(-1)[0] = 1
    tensors = {"uniform": uniform, "mixed": mixed}
    before = {name: digest_of(tensor) for name, tensor in tensors.items()}
    fresh = InitialValues(tensors)
    for tensor in tensors.values():
        if tensor.numel():
            tensor.view(-1).view(torch.uint8).fill_(1 if dtype == torch.bool else 0x5A)
    fresh.restore()
    fresh.check_filled()
    assert {name: digest_of(tensor) for name, tensor in tensors.items()} == before


def test_a_nan_keeps_its_bits() -> None:
    tensor = torch.full((3,), 0x7FA5, dtype=torch.int16).view(torch.bfloat16)
    fresh = InitialValues({"nan": tensor})
    tensor.zero_()
    fresh.restore()
    assert tensor.view(torch.int16).tolist() == [0x7FA5] * 3


def test_a_large_tensor_of_unknown_value_that_is_not_filled_is_reported() -> None:
    large = torch.arange(2 << 20, dtype=torch.float32)
    covered = large.clone()
    fresh = InitialValues({"large": large, "covered": covered})
    fresh.restore()
    covered.fill_(1)
    with pytest.raises(NotRestored, match="large") as caught:
        fresh.check_filled()
    assert caught.value.names == ("large",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int32, torch.complex128])
@pytest.mark.parametrize("turned", [False, True])
def test_a_large_tensor_that_is_zero_in_the_checkpoint_counts_as_filled(dtype: torch.dtype, turned: bool) -> None:
    mixed = torch.arange(1 << 20, dtype=torch.int64).view(dtype).view(64, -1)
    large = mixed.t() if turned else mixed
    left, partly = large.clone(), large.clone()
    fresh = InitialValues({"large": large, "left": left, "partly": partly})
    fresh.restore()
    assert float(left.abs().max()) <= 1, "what a loader leaves out is as good as zero"
    large.zero_()
    partly[-1].fill_(3)
    with pytest.raises(NotRestored) as caught:
        fresh.check_filled()
    assert caught.value.names == ("left",)
    assert not large.any()


def test_a_tensor_filled_by_the_constructor_is_restored_whatever_its_size() -> None:
    large = torch.arange(2 << 20, dtype=torch.float32)
    before = digest_of(large)
    fresh = InitialValues({"large": large}, {"large"})
    large.zero_()
    fresh.restore()
    fresh.check_filled()
    assert digest_of(large) == before


def test_only_listed_attributes_are_taken_over_and_others_are_named() -> None:
    model = Tiny()
    state = PlainState(model)
    assert state.changed_by_loading(model) == []
    model.has_own_lm_head = True
    assert state.changed_by_loading(model) == []
    assert load_state_of(model) == {"has_own_lm_head": True}
    model.up.out_features = 7
    assert state.changed_by_loading(model) == ["up.out_features"]
    model.up.out_features = 4
    client = Tiny()
    apply_load_state(client, {"has_own_lm_head": True, "has_own_embed_tokens": True, "training": True})
    assert client.has_own_lm_head
    assert not hasattr(client, "has_own_embed_tokens")


def test_an_address_file_is_written_atomically_and_removed(tmp_path: Path) -> None:
    file = AddressFile(f"{tmp_path}/addr-", 3)
    file.write("10.0.0.1:1024")
    assert (tmp_path / "addr-3.txt").read_text() == "10.0.0.1:1024"
    file.write("[fd00::1]:1025")
    assert [path.name for path in tmp_path.iterdir()] == ["addr-3.txt"]
    file.remove()
    file.remove()
    assert list(tmp_path.iterdir()) == []


def test_an_address_file_of_a_successor_is_left_alone(tmp_path: Path) -> None:
    first, second = AddressFile(f"{tmp_path}/", 0), AddressFile(f"{tmp_path}/", 0)
    first.write("10.0.0.1:1024")
    second.write("10.0.0.1:2048")
    first.remove()
    assert (tmp_path / "0.txt").read_text() == "10.0.0.1:2048"


def test_a_folder_that_does_not_exist_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(AddressFileError, match="nowhere"):
        AddressFile(f"{tmp_path}/nowhere/x", 0).write("10.0.0.1:1024")


reports = st.builds(
    Report,
    outcome=st.sampled_from(["pulled", "default", "failed"]),
    rank=st.integers(0, 9999),
    root=st.text("0123456789abcdef", max_size=64),
    load=st.text("0123456789abcdef", max_size=64),
    fingerprint=st.text("0123456789abcdef", max_size=64),
    reason=st.text(max_size=300),
)


@given(reports)
def test_a_report_fits_its_slot_and_comes_back(report: Report) -> None:
    packed = report.packed()
    assert len(packed) == REPORT_BYTES
    back = Report.unpacked(packed)
    assert (back.outcome, back.rank, back.root, back.load) == (report.outcome, report.rank, report.root, report.load)
    assert report.reason.startswith(back.reason)


_BOTH = load_digest(["r", "s"])


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ((Report("pulled", 0, root="r", load=_BOTH), Report("pulled", 1, root="s", load=_BOTH)), ""),
        ((Report("pulled", 0, root="r", load="a"), Report("pulled", 1, root="s", load="a")), "hold together"),
        ((Report("pulled", 0, load="a"), Report("default", 1)), ""),
        ((Report("default", 0, fingerprint="a"), Report("default", 1, fingerprint="b")), ""),
        ((Report("pulled", 0), Report("failed", 1, reason="refused: dtype")), "rank 1 could not pull: refused: dtype"),
        ((Report("pulled", 0, load="a"), Report("pulled", 1, load="b")), "different loads"),
        ((Report("pulled", 0, fingerprint="a"), Report("default", 1, fingerprint="b")), "different loads"),
        ((Report("pulled", 0, load="a"), Report("pulled", 1)), "hold together"),
    ],
)
def test_ranks_disagree_when_one_failed_or_the_weights_differ(told: tuple[Report, ...], expected: str) -> None:
    assert expected in disagreement(told)
    assert bool(disagreement(told)) == bool(expected)


class WithContainers(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.scales = [1.0, 2.0]
        self.table = {"a": (1, {"b": 2})}
        self.names = {"x"}
        self.settings = SimpleNamespace(step=1)
        self.unregistered = [torch.nn.Linear(2, 2)]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda m: m.scales.append(3.0), "scales[2]"),
        (lambda m: m.scales.__setitem__(0, 9.0), "scales[0]"),
        (lambda m: m.table["a"][1].update(b=3), "table[a][1][b]"),
        (lambda m: m.names.add("y"), "names[1]"),
        (lambda m: setattr(m.settings, "step", 2), "settings.step"),
        (lambda m: setattr(m.unregistered[0], "in_features", 5), "unregistered[0].in_features"),
    ],
)
def test_plain_values_in_lists_mappings_and_objects_are_compared_too(change: Any, name: str) -> None:
    model = WithContainers()
    state = PlainState(model)
    assert state.changed_by_loading(model) == []
    change(model)
    assert state.changed_by_loading(model) == [name]
