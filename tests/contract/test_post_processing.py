"""What the newest release's post-processing does to weights without quantisation, as it was read.

`netloader/vllm/model/overwritten.py` relies on it. These tests are meant to fail with the next release that changes it.
Read then what changed, correct that module if needed, and state here what was read.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache

import pytest

from netloader.vllm.model.overwritten import LEAVE_WEIGHTS
from tests.contract.names import NEWEST, NEWEST_THAT_RUNS
from tests.contract.sources import Sources
from tests.wheels import sources_of

_MOE = "vllm.model_executor.layers.fused_moe"

READ = {
    ("vllm.model_executor.utils", "replace_parameter"): "cf505e4970296d6c",
    ("vllm.model_executor.model_loader.utils", "process_weights_after_loading"): "aa0bf651d0acec15",
    ("vllm.model_executor.layers.linear", "UnquantizedLinearMethod.process_weights_after_loading"): "e345bbc59486a2c1",
    (
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "UnquantizedEmbeddingMethod.process_weights_after_loading",
    ): "321d7f872dc5e495",
    ("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm"): "046393bfd54dfd7d",
    (
        f"{_MOE}.unquantized_fused_moe_method",
        "UnquantizedFusedMoEMethod.process_weights_after_loading",
    ): "e4153d641aef2c9e",
    (f"{_MOE}.unquantized_fused_moe_method", "UnquantizedFusedMoEMethod._setup_kernel"): "2114015d8affcbb5",
    (f"{_MOE}.unquantized_fused_moe_method", "UnquantizedFusedMoEMethod._maybe_pad_weight"): "7e58bdcf7c8b44c8",
    (f"{_MOE}.oracle.unquantized", "convert_to_unquantized_kernel_format"): "d5645031281f0f68",
}
"""Module and symbol -> digest of its text in the newest release."""

QUANTISED = (
    "vllm.model_executor.kernels.linear.",
    "vllm.model_executor.layers.quantization.",
)
"""What only quantised layers use. KEEP_RAW does not apply to those."""

CALLERS = {
    "vllm.model_executor.layers.attention.mla_attention": "adds W_UV and W_UK_T; puts an empty tensor for kv_b_proj",
    f"{_MOE}.experts.cpu_moe": "experts without quantisation, by tensors of equal layout; experts with quantisation",
    f"{_MOE}.oracle.fp8": "experts with quantisation",
    f"{_MOE}.oracle.int8": "experts with quantisation",
    f"{_MOE}.oracle.mxfp4": "experts with quantisation",
    f"{_MOE}.unquantized_fused_moe_method": "experts without quantisation, by tensors of equal layout",
    "vllm.model_executor.utils": "defines it",
    "vllm.models.deepseek_v4.amd.model": "linear layers with fp8 weights",
    "vllm.models.deepseek_v4.amd.rocm": "linear layers with fp8 weights",
    "vllm.models.deepseek_v4.cpu.cpu_sparse": "puts empty tensors for wo_a",
    "vllm.models.deepseek_v41.amd.rocm": "linear layers with fp8 weights",
    "vllm.models.kimi_k3.nvidia.mla": "adds W_UV and W_UK_T",
    "vllm.models.muse_spark.nvidia.muse_moe_runner": "experts with quantisation",
}
"""Other modules that call `replace_parameter`, and what they replace."""


@cache
def release(number: str) -> Sources:
    return Sources(sources_of("vllm", number))


def newest() -> Sources:
    return release(NEWEST)


def digest(sources: Sources, module: str, symbol: str) -> str:
    found = sources.find(module, symbol)
    assert found is not None, f"{module} has no {symbol}"
    text = ast.get_source_segment(sources.text(found[0]), found[1])
    assert text is not None
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@pytest.mark.parametrize(("module", "symbol"), READ)
def test_what_was_read_is_what_the_newest_release_has(module: str, symbol: str) -> None:
    now = digest(newest(), module, symbol)
    assert now == READ[module, symbol], (
        f"{module}.{symbol} changed: find out whether it writes to weights that KEEP_RAW refers to, then state {now}"
    )


def test_a_change_between_two_releases_is_seen() -> None:
    """Between these two, `replace_parameter` began to copy in place."""
    one = ("vllm.model_executor.utils", "replace_parameter")
    assert digest(release(NEWEST_THAT_RUNS), *one) != digest(newest(), *one)


def callers() -> set[str]:
    sources = newest()
    return {
        module
        for module in sources.modules()
        if not module.startswith(QUANTISED) and "replace_parameter(" in sources.text(module)
    }


def test_all_callers_of_replace_parameter_were_read() -> None:
    assert callers() == CALLERS.keys(), "read what a new caller replaces: weights without quantisation need copies"


@pytest.mark.parametrize(
    "owner",
    [f"{_MOE}.experts.triton_moe.TritonExperts", f"{_MOE}.experts.fused_batched_moe.BatchedTritonExperts"],
)
def test_experts_of_triton_change_no_weights(owner: str) -> None:
    """The base class does nothing."""
    assert {"TRITON", "BATCHED_TRITON"} == LEAVE_WEIGHTS
    module, _, name = owner.rpartition(".")
    assert newest().find(module, name) is not None
    assert newest().find(module, f"{name}.process_weights_after_loading") is None
    base = newest().find(f"{_MOE}.modular_kernel", "FusedMoEExperts.process_weights_after_loading")
    assert base is not None
    assert isinstance(base[1], ast.FunctionDef)
    assert ast.unparse(base[1].body[0]) == "pass"
