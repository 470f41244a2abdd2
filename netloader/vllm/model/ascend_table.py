"""What is known of vllm-ascend's post-processing, so that its processed weights can be pulled. Data only.

Each class here was loaded by `tests/ascend`, which compare the pulled model with one loaded from files. A class that is
not listed is refused by name, and so is another release. `docs/ascend-quantisation.md` has what became of each tensor.
Classes are listed by their full names, and matched exactly: a derived class may post-process otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = [
    "ATTENTION",
    "DROPPED",
    "HARMLESS",
    "METHODS",
    "PACKAGE",
    "RECOMPUTED",
    "REGISTRIES",
    "RELEASE",
    "SCHEMES",
    "WRAPPED",
    "Harmless",
]

PACKAGE = "vllm_ascend"

RELEASE = ("0.23.0", "vllm-ascend 0.23.0.post1")
"""The releases that the table is about: vLLM, and the distribution of its platform."""

_VLLM = "vllm.model_executor.layers"
_QUANTISATION = "vllm_ascend.quantization"
_EXPERTS = "vllm_ascend.ops.fused_moe.fused_moe"
_EIGHT_BIT_EXPERTS = f"{_QUANTISATION}.methods.w8a8_dynamic.AscendW8A8DynamicFusedMoEMethod"
_FOUR_BIT_EXPERTS = f"{_QUANTISATION}.methods.w4a8.AscendW4A8DynamicFusedMoEMethod"
_FLATQUANT = f"{_QUANTISATION}.methods.w4a4_flatquant.AscendW4A4FlatQuantDynamicLinearMethod"

METHODS = frozenset(
    (
        f"{_VLLM}.linear.UnquantizedLinearMethod",
        f"{_VLLM}.vocab_parallel_embedding.UnquantizedEmbeddingMethod",
        "vllm_ascend.ops.linear.AscendUnquantizedLinearMethod",
        f"{_EXPERTS}.AscendUnquantizedFusedMoEMethod",
        f"{_QUANTISATION}.method_adapters.AscendLinearMethod",
        f"{_QUANTISATION}.method_adapters.AscendFusedMoEMethod",
    )
)
"""Quantisation methods of layers. The last two hand the work to a scheme."""

_MODELSLIM = ("",)
_BOTH = ("", "compressed-tensors")

SCHEMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        f"{_QUANTISATION}.methods.w8a8_static.AscendW8A8LinearMethod": _MODELSLIM,
        f"{_QUANTISATION}.methods.w8a8_dynamic.AscendW8A8DynamicLinearMethod": _BOTH,
        f"{_QUANTISATION}.methods.w8a8_pdmix.AscendW8A8PDMixLinearMethod": _MODELSLIM,
        f"{_QUANTISATION}.methods.w8a16.AscendW8A16LinearMethod": _MODELSLIM,
        f"{_QUANTISATION}.methods.w4a8.AscendW4A8DynamicLinearMethod": _MODELSLIM,
        f"{_QUANTISATION}.methods.w4a4_laos_dynamic.AscendW4A4LaosDynamicLinearMethod": _MODELSLIM,
        _FLATQUANT: _MODELSLIM,
        _EIGHT_BIT_EXPERTS: _MODELSLIM,
        _FOUR_BIT_EXPERTS: _MODELSLIM,
    }
)
"""Schemes, and the formats of checkpoints with which each was loaded: the layer's `ascend_quant_method`, empty for
ModelSlim's. Some schemes post-process another format by other code."""

_LATENT_ATTENTION = "vllm_ascend.attention.mla_v1.AscendMLAImpl"

ATTENTION: Mapping[str, str] = MappingProxyType(
    {
        f"{_VLLM}.attention.attention.Attention": "vllm_ascend.attention.attention_v1.AscendAttentionBackendImpl",
        f"{_VLLM}.attention.mla_attention.MLAAttention": _LATENT_ATTENTION,
    }
)
"""Modules with a post-processing of their own, and the class of their `impl`, which does it."""

WRAPPED: Mapping[str, str] = MappingProxyType({f"{_VLLM}.attention.mla_attention.MLAAttention": "vllm_ascend.ops.mla"})
"""Modules whose post-processing is replaced when they are built, and the module of the function that replaces it. Any
other replaced one is unknown: it may share weights between ranks, or hold them elsewhere."""

RECOMPUTED: Mapping[str, Mapping[str, str]] = MappingProxyType({_FLATQUANT: {"aclnn_clip_ratio": "clip_ratio"}})
"""Plain values of a layer that post-processing reads from a tensor of one element, by scheme: attribute -> tensor."""

DROPPED: Mapping[str, Mapping[tuple[str, str], str]] = MappingProxyType(
    {
        _LATENT_ATTENTION: {
            ("fused_qkv_a_proj", "weight"): "wd_qkv",
            ("fused_qkv_a_proj", "deq_scale"): "deq_scale_qkv",
            ("fused_qkv_a_proj", "quant_bias"): "quant_bias_qkv",
            ("q_proj", "weight"): "wu_q",
            ("q_proj", "deq_scale"): "qb_deq_scl",
            ("q_proj", "quant_bias"): "qb_qt_bias",
        }
    }
)
"""Parameters that become None, because another tensor has their contents; by the class of an `impl`: its layer and the
parameter -> its own attribute with the tensor."""


@dataclass(frozen=True)
class Harmless:
    """A plain value that may differ between two engines with equal weights.

    Attributes:
        owners: The classes that have it.
        why: The reason.
    """

    owners: frozenset[str]
    why: str


HARMLESS: Mapping[str, Harmless] = MappingProxyType(
    {
        "moe_instance_id": Harmless(
            frozenset({f"{_EXPERTS}.AscendFusedMoE"}),
            "counts the layers that this process has built. It selects the layer's part of an expert map, and the maps "
            "themselves are compared",
        ),
        "moe_all_to_all_group_name": Harmless(
            frozenset({_EIGHT_BIT_EXPERTS, _FOUR_BIT_EXPERTS}),
            "the name of this engine's communicator",
        ),
    }
)
"""Values that are not compared, by the name of the attribute."""

REGISTRIES: Mapping[tuple[str, str, str], int | tuple[()]] = MappingProxyType(
    {
        (_EXPERTS, "AscendFusedMoE", "moe_counter"): -1,
        ("vllm_ascend.eplb.adaptor.vllm_adaptor", "VllmEplbAdaptor", "_registered_moe_layers"): (),
    }
)
"""Attributes of classes that the constructor of a layer changes, as module, class and name, with the first value: a
counter, by which a layer finds its part of an expert map, and a list that keeps layers alive."""
