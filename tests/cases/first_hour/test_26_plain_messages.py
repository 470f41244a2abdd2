"""Tensors that differ are reported in plain words, with the difference that tells most first."""

from __future__ import annotations

from netloader.core.manifest import Manifest, TensorSpec, compare, manifest_digest
from netloader.errors import ManifestError
from tests.core.pair import Pair, Weights, client_terms, run, server_terms
from tests.core.stories import error_of

SAME = Weights()


def test_one_tensor_differs_in_the_singular() -> None:
    ours = Manifest((TensorSpec("w", "int8", (7,)), *SAME.announcement().manifest.tensors[1:]))
    terms = client_terms(SAME, manifest=ours, manifest_digest=manifest_digest(ours))
    pair = run(Pair(terms, server_terms()))
    error = error_of(pair.client, ManifestError, "1 tensor differs from what the server holds; w: ")
    assert "tensors differ" not in str(error)


def test_a_shape_that_differs_comes_before_any_number_of_tensors_of_one_side() -> None:
    extra = tuple(TensorSpec(f"extra.{number}", "int8", ()) for number in range(30))
    ours = Manifest((TensorSpec("w", "int8", (8,)),))
    theirs = Manifest((*extra, TensorSpec("w", "int8", (4,))))
    first, second, *_ = compare(ours, theirs)
    assert str(first) == "w: shape is (8,) here and (4,) at the server"
    assert second.reason == "it is not expected here"


def test_an_order_in_memory_is_described_and_not_shown_as_an_empty_stride() -> None:
    ours = Manifest((TensorSpec("w", "int8", (1000, 4), (1, 1000)),))
    theirs = Manifest((TensorSpec("w", "int8", (1000, 4)),))
    (found,) = compare(ours, theirs)
    assert found.reason == "in memory it is in the order of strides (1, 1000) here and in row-major order at the server"
