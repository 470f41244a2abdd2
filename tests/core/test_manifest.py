"""Manifests: hostile ones are refused quickly, differing ones are compared by name, and the root sees everything."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netloader.core.manifest import (
    DIGEST_BYTES,
    ITEM_BYTES,
    MAX_DIMS,
    MAX_ELEMENTS,
    MAX_NAME,
    Manifest,
    TensorSpec,
    compare,
    compute_root,
    is_dense,
    manifest_digest,
)
from netloader.core.plan import MAX_BLOCK_BYTES, make_plan
from netloader.errors import ManifestError
from tests.core.strategies import LONG_NAME, dtypes, manifests

A = TensorSpec("a", "bfloat16", (4, 3))
B = TensorSpec("b", "float32", (5,))


def problems_of(*specs: TensorSpec) -> str:
    with pytest.raises(ManifestError) as caught:
        Manifest(specs).check()
    assert caught.value.hint
    return str(caught.value)


# --- check ----------------------------------------------------------------------------------------------------------


@given(manifest=manifests())
def test_sound_manifests_pass(manifest: Manifest) -> None:
    manifest.check()


@pytest.mark.parametrize(
    ("specs", "says"),
    [
        ((A, A), "the name is not unique"),
        ((TensorSpec("", "int8", ()),), "a name has 1 to 1024 characters"),
        ((TensorSpec(LONG_NAME + "n", "int8", ()),), "this one 1025"),
        ((TensorSpec("a", "float3", ()),), "unknown dtype 'float3'"),
        ((TensorSpec("a", "torch.float32", ()),), "unknown dtype"),
        ((TensorSpec("a", "x" * 100_000, ()),), "unknown dtype"),
        ((TensorSpec("a", "int8", (2**62, 2)),), "impossible shape"),
        ((TensorSpec("a", "int8", (0, 2**62, 2**62)),), "impossible shape"),
        ((TensorSpec("a", "int8", (2**63,)),), "impossible shape"),
        ((TensorSpec("a", "int8", (-1,)),), "impossible shape"),
        ((TensorSpec("a", "int8", (-1, -1)),), "impossible shape"),
        ((TensorSpec("a", "int8", (1,) * (MAX_DIMS + 1)),), "impossible shape"),
        ((TensorSpec("a", "int8", (2**62,) * 100_000),), "impossible shape"),
        ((TensorSpec("a", "int8", (4, 3), (3,)),), "does not cover"),
        ((TensorSpec("a", "int8", (4, 3), (3, 2)),), "does not cover"),
        ((TensorSpec("a", "int8", (4, 3), (0, 1)),), "does not cover"),
        ((TensorSpec("a", "int8", (4, 3), (-3, 1)),), "does not cover"),
        ((TensorSpec("a", "int8", (4,), (1,) * 100_000),), "does not cover"),
        ((TensorSpec("a", "int8", (), alias_of="a"),), "no earlier tensor"),
        ((TensorSpec("a", "int8", (), alias_of="z"),), "no earlier tensor"),
        ((TensorSpec("c", "float32", (5,), alias_of="b"), B), "no earlier tensor"),
        (
            (B, TensorSpec("c", "float32", (5,), alias_of="b"), TensorSpec("d", "float32", (5,), alias_of="c")),
            "no earl",
        ),
        ((B, TensorSpec("c", "float32", (6,), alias_of="b")), "another dtype, shape, stride"),
        ((B, TensorSpec("c", "int32", (5,), alias_of="b")), "another dtype, shape, stride"),
        ((B, TensorSpec("c", "float32", (5,), (1,), alias_of="b")), "another dtype, shape, stride"),
        ((B, TensorSpec("c", "float32", (5,), (), "nz", alias_of="b")), "another dtype, shape, stride or format"),
        ((TensorSpec("half \ud800", "int8", ()),), "UTF-8"),
    ],
)
def test_unusable_tensors_are_refused_by_name(specs: tuple[TensorSpec, ...], says: str) -> None:
    text = problems_of(*specs)
    assert says in text
    assert repr(specs[-1].name)[:20] in text or repr(specs[0].name)[:20] in text
    assert len(text) < 2000


def test_all_problems_are_reported_at_once() -> None:
    text = problems_of(*(TensorSpec(f"t{i}", "nope", ()) for i in range(30)))
    assert "30 unusable" in text
    assert "'t0'" in text
    assert "and 10 more" in text


def test_limits_themselves_are_allowed() -> None:
    Manifest(
        (
            TensorSpec(LONG_NAME, "int8", (MAX_ELEMENTS,)),
            TensorSpec("dims", "int8", (1,) * MAX_DIMS),
            TensorSpec("empty", "int8", (0, 3), (17, 0)),
            TensorSpec("scalar", "float64", ()),
        )
    ).check()


anything = st.builds(
    TensorSpec,
    name=st.text(max_size=3),
    dtype=dtypes | st.text(max_size=5),
    shape=st.lists(st.integers(-(2**70), 2**70) | st.integers(-2, 4), max_size=70).map(tuple),
    stride=st.just(()) | st.lists(st.integers(-(2**70), 2**70) | st.integers(-2, 4), max_size=70).map(tuple),
    format=st.sampled_from(["nd", "nz"]) | st.text(max_size=3),
    alias_of=st.just("") | st.text(max_size=3),
)


@given(specs=st.lists(anything, max_size=5))
@example(specs=[TensorSpec("a", "complex128", (2**62,), (1,))])
@example(specs=[TensorSpec("a", "int8", (0,), (2**70,))])
def test_any_manifest_is_refused_cleanly_or_can_be_planned(specs: list[TensorSpec]) -> None:
    manifest = Manifest(tuple(specs))
    try:
        manifest.check()
    except ManifestError:
        return
    assert manifest_digest(manifest)
    try:
        plan = make_plan(manifest, MAX_BLOCK_BYTES)
    except ManifestError as error:
        assert "more than" in str(error)  # noqa: PT017 - the other outcome is as good
    else:
        assert plan.nbytes == manifest.nbytes


@given(shape=st.lists(st.integers(0, 4), max_size=4), stride=st.lists(st.integers(0, 30), max_size=4))
def test_dense_means_each_address_once(shape: list[int], stride: list[int]) -> None:
    addresses = [0]
    for size, step in zip(shape, stride, strict=False):
        addresses = [a + i * step for a in addresses for i in range(size)]
    expected = len(shape) == len(stride) and sorted(addresses) == list(range(len(addresses)))
    assert is_dense(shape, stride) == expected


def test_bytes_of_aliases_are_sent_once() -> None:
    manifest = Manifest((B, TensorSpec("c", "float32", (5,), alias_of="b")))
    assert [t.nbytes for t in manifest.tensors] == [20, 20]
    assert [t.wire_bytes for t in manifest.tensors] == [20, 0]
    assert manifest.nbytes == 20


# --- compare --------------------------------------------------------------------------------------------------------


def test_each_differing_field_is_named_with_both_values() -> None:
    theirs = Manifest((A, TensorSpec("b", "float16", (6,), (1,), "nz", "a")))
    (found,) = compare(Manifest((A, B)), theirs)
    assert found.name == "b"
    for text in (
        "dtype is 'float32' here and 'float16' at",
        "(5,)",
        "(6,)",
        "strides (1,) at",
        "'nz'",
        "shares the memory of 'a'",
    ):
        assert text in found.reason


def test_tensors_that_differ_come_before_missing_and_unexpected_ones() -> None:
    ours = Manifest((TensorSpec("x", "int8", ()), A, B))
    theirs = Manifest((A, TensorSpec("b", "float32", (6,)), TensorSpec("y", "int8", ())))
    found = compare(ours, theirs)
    assert [(f.name, "does not hold" in f.reason, "not expected" in f.reason) for f in found] == [
        ("b", False, False),
        ("x", True, False),
        ("y", False, True),
    ]
    assert str(found[1]) == "x: the server does not hold it"


def test_order_counts() -> None:
    (found,) = compare(Manifest((A, B)), Manifest((B, A)))
    assert (found.name, found.reason) == ("a", "the server has 'b' at position 0")


def test_a_duplicate_name_does_not_crash_the_comparison() -> None:
    assert compare(Manifest((A, B)), Manifest((A, B, A)))
    assert compare(Manifest((A, B, A)), Manifest((A, B)))


@given(ours=manifests(max_tensors=5), theirs=manifests(max_tensors=5))
def test_compare_finds_nothing_exactly_when_both_are_equal(ours: Manifest, theirs: Manifest) -> None:
    assert (compare(ours, theirs) == ()) == (ours == theirs)
    assert {f.name for f in compare(ours, theirs)} <= {t.name for t in (*ours.tensors, *theirs.tensors)}


# --- digest and root ------------------------------------------------------------------------------------------------


@given(one=manifests(max_tensors=4), two=manifests(max_tensors=4))
def test_different_manifests_have_different_digests(one: Manifest, two: Manifest) -> None:
    assert (manifest_digest(one) == manifest_digest(two)) == (one == two)


def test_the_digest_is_unchanged() -> None:
    """Both sides have to compute the same, whatever release they run."""
    manifest = Manifest((A, B, TensorSpec("c", "float32", (5,), alias_of="b"), TensorSpec("t", "int8", (2, 3), (1, 2))))
    assert manifest_digest(manifest) == "4066dad7343b2b6c7fb83ace7c3d74a069ef551d68d3c43c9f9598dcaf13ecfa"
    digests = bytes(range(DIGEST_BYTES))
    assert (
        compute_root(manifest, 1024, "xxh3-128", digests)
        == "91c388da41a6aa2d5ba7336139d0fd0355e9310cc67fcebf471e4fb424884556"
    )


def variants(spec: TensorSpec) -> list[TensorSpec]:
    fields: dict[str, Any] = {
        "name": spec.name + "x",
        "dtype": "int8",
        "shape": (*spec.shape, 2),
        "stride": (1, 4),
        "format": "nz",
        "alias_of": "a",
    }
    assert fields.keys() == set(TensorSpec.__struct_fields__)
    return [TensorSpec(**{**msgspec.structs.asdict(spec), name: value}) for name, value in fields.items()]


def test_the_root_changes_with_every_field_order_size_and_algorithm() -> None:
    digests = bytes(range(2 * DIGEST_BYTES))
    base = Manifest((A, B))
    inputs = [
        (base, 1024, "xxh3-128", digests),
        (base, 1025, "xxh3-128", digests),
        (base, 1024, "blake2b-128", digests),
        (Manifest((B, A)), 1024, "xxh3-128", digests),
        (Manifest((A,)), 1024, "xxh3-128", digests),
        *((Manifest((A, other)), 1024, "xxh3-128", digests) for other in variants(B)),
    ]
    roots = {compute_root(*given_) for given_ in inputs}
    assert len(roots) == len(inputs)
    assert all(len(root) == 64 for root in roots)


@given(digests=st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=6, unique=True), data=st.data())
def test_the_root_changes_with_any_flip_swap_or_loss(digests: list[bytes], data: st.DataObject) -> None:
    manifest = Manifest((A,))

    def root(blocks: list[bytes]) -> str:
        return compute_root(manifest, 1024, "xxh3-128", b"".join(blocks))

    at, bit = data.draw(st.integers(0, len(digests) - 1)), data.draw(st.integers(0, 127))
    flipped = list(digests)
    flipped[at] = (int.from_bytes(flipped[at], "big") ^ (1 << bit)).to_bytes(16, "big")
    assert root(flipped) != root(digests)
    shuffled = data.draw(st.permutations(digests))
    assert (root(shuffled) == root(digests)) == (shuffled == digests)
    assert root(digests[:-1]) != root(digests)


# --- on the wire ----------------------------------------------------------------------------------------------------


@given(manifest=manifests())
def test_the_wire_form_round_trips(manifest: Manifest) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(manifest), type=Manifest) == manifest


@pytest.mark.parametrize(
    "spec",
    [
        ["", "int8", []],
        ["n" * (MAX_NAME + 1), "int8", []],
        ["a", "x" * 65, []],
        ["a", "int8", [-1]],
        ["a", "int8", [MAX_ELEMENTS + 1]],
        ["a", "int8", [1] * (MAX_DIMS + 1)],
        ["a", "int8", [], [1] * (MAX_DIMS + 1)],
        ["a", "int8", [], [], "f" * 65],
        ["a", "int8", [], [], "nd", "n" * (MAX_NAME + 1)],
        ["a", "int8", ["1"]],
        ["a", "int8", [1.5]],
    ],
)
def test_values_that_check_forbids_do_not_decode(spec: list[Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode([[spec]]), type=Manifest)


def test_fields_that_a_newer_release_adds_at_the_end_are_ignored() -> None:
    wire = msgspec.msgpack.encode([[["a", "int8", [2], [], "nd", "", "something new"]], "more"])
    assert msgspec.msgpack.decode(wire, type=Manifest) == Manifest((TensorSpec("a", "int8", (2,)),))


def test_every_dtype_has_a_size() -> None:
    assert all(size in (1, 2, 4, 8, 16) for size in ITEM_BYTES.values())
