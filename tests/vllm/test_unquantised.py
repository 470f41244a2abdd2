"""Plain layers are known by the base class of their method, whatever a package calls its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from netloader.vllm.model.unquantised import is_quantised, reloads_exactly

pytestmark = pytest.mark.usefixtures("needs_vllm")


def bases() -> tuple[type, type, type]:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    return UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod


def made(base: type, name: str, **attributes: Any) -> Any:
    """An object of a class of this name, without its constructor, which wants a whole configuration."""
    derived = type(name, (base,), attributes)
    return object.__new__(derived)


def test_a_derived_method_is_plain() -> None:
    for base in bases():
        assert not is_quantised(SimpleNamespace(quant_method=made(base, "AscendOwnMethod")))
    assert not is_quantised(SimpleNamespace())
    assert not is_quantised(SimpleNamespace(quant_method=object()))


def test_a_name_alone_makes_no_method_plain() -> None:
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    more = {"create_weights": lambda *_: None, "apply": lambda *_: None}
    assert is_quantised(SimpleNamespace(quant_method=made(QuantizeMethodBase, "UnquantizedLinearMethod", **more)))


def test_a_derived_class_reloads_as_its_base_only_if_it_post_processes_as_that() -> None:
    from vllm.model_executor.layers.attention import Attention

    linear, embedding, experts = bases()
    for compared in (linear, embedding, Attention):
        assert reloads_exactly(made(compared, "Derived"))
        assert not reloads_exactly(made(compared, compared.__name__, process_weights_after_loading=lambda *_: None))
    assert not reloads_exactly(made(experts, "UnquantizedLinearMethod"))
