"""Changes of an engine's process, made before it loads: a bug, another release, or what real hosts have otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from torch_npu import _collectives
from vllm_ascend import utils
from vllm_ascend.ops.fused_moe.fused_moe import AscendFusedMoE
from vllm_ascend.quantization.methods import registry
from vllm_ascend.quantization.methods.w8a8_static import AscendW8A8LinearMethod

from netloader.vllm.model import ascend_processed, object_walk
from netloader.vllm.serve import choose_layout


def no_raw_target() -> None:
    """The raw layout of the target is not served, as if something had been lost."""
    exact = choose_layout._raw

    def raw(snapshot: Any, recorded: Any, model: Any, *rest: Any) -> Any:
        if snapshot.role != "target":
            return exact(snapshot, recorded, model, *rest)
        sizes = {spec.name: spec.nbytes for spec in recorded.announcement.manifest.tensors}
        return choose_layout._processed(snapshot, model, sizes, ("no raw layout in this test", "none"))

    choose_layout._raw = raw  # type: ignore[assignment]


def post_process_twice() -> None:
    """A bug: nothing keeps vLLM's own call from post-processing weights that are processed already."""
    ascend_processed.AscendContract.skipping = lambda self, model: nullcontext()  # type: ignore[assignment,method-assign,return-value]


def another_release() -> None:
    """The table is about another release than the one that runs."""
    ascend_processed.RELEASE = ("0.23.0", "vllm-ascend 0.22.0")  # type: ignore[attr-defined]


def a_derived_scheme() -> None:
    """A scheme that derives from one in the table takes its place."""
    registry._SCHEME_REGISTRY["W8A8", "linear"] = Derived


class Derived(AscendW8A8LinearMethod):  # type: ignore[misc]
    """Nothing is known of it."""


def a_replaced_method() -> None:
    """A method of one layer has another post-processing, as layers whose weights several ranks share have."""
    build = AscendW8A8LinearMethod.__init__

    def with_own(self: Any) -> None:
        build(self)
        self.process_weights_after_loading = lambda layer: None

    AscendW8A8LinearMethod.__init__ = with_own


def nothing_recomputed() -> None:
    """A bug: plain values that are read from tensors stay those of the zeros."""
    ascend_processed.RECOMPUTED = {}  # type: ignore[attr-defined]


def another_card() -> None:
    """This process is on an Atlas A3."""
    utils.get_ascend_device_type = lambda: utils.AscendDeviceType.A3


def other_harmless_values() -> None:
    """This process has built layers with experts before, and its communicators have names of their own."""
    AscendFusedMoE.moe_counter = 6
    for _ in range(6):
        next(_collectives._numbers)


def harmless_counts() -> None:
    """A bug: values count that differ between engines with equal weights."""
    object_walk.HARMLESS = {}  # type: ignore[attr-defined]


CHANGES: Mapping[str, Callable[[], None]] = {
    change.__name__: change
    for change in (
        no_raw_target,
        post_process_twice,
        another_release,
        a_derived_scheme,
        a_replaced_method,
        nothing_recomputed,
        another_card,
        other_harmless_values,
        harmless_counts,
    )
}
