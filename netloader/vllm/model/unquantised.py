"""Which layers hold plain weights: by the base class of their method, because packages and models derive their own."""

from __future__ import annotations

from typing import Any

__all__ = ["is_quantised", "reloads_exactly"]


def is_quantised(module: Any) -> bool:
    """Whether the weights of a module are quantised."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    plain = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod)
    method = getattr(module, "quant_method", None)
    return isinstance(method, QuantizeMethodBase) and not isinstance(method, plain)


def reloads_exactly(processes: Any) -> bool:
    """Whether vLLM's reload gives the same bytes as a first load, for a method of a layer or an attention.

    For three classes both were compared byte by byte. Others give different bytes (W8A8 and MoE on CPUs, with vLLM
    0.32), or were not compared. A class that is derived from one of them counts as that one if it post-processes by the
    same function.
    """
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    return any(
        isinstance(processes, compared)
        and type(processes).process_weights_after_loading is compared.process_weights_after_loading
        for compared in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, Attention)
    )
