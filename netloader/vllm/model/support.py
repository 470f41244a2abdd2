"""Features with which a model's raw tensors can be neither pulled nor served; checked before the first byte."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from netloader.vllm.model.expert_maps import moving_experts

if TYPE_CHECKING:
    import torch

__all__ = ["why_not"]


def why_not(vllm_config: Any, tensors: Mapping[str, torch.Tensor], model_config: Any) -> str:
    """Why this model's raw tensors can be neither pulled nor served; empty when they can.

    Args:
        vllm_config: vLLM's configuration.
        tensors: Parameters and persistent buffers of the model, before `load_weights`.
        model_config: vLLM's configuration of that model. For a draft it is not the one in `vllm_config`.
    """
    reason = _quantisation(model_config) or _without_memory(model_config, tensors)
    if reason:
        return reason
    for check in _CHECKS:
        reason = check(vllm_config, tensors)
        if reason:
            return reason
    return ""


def _without_memory(model_config: Any, tensors: Mapping[str, torch.Tensor]) -> str:
    meta = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if not meta:
        return ""
    if model_config.quantization is not None:
        return f"online quantisation creates weights while they are loaded ({_some(meta)})"
    return f"some weights have no memory before they are loaded ({_some(meta)})"


def _uninitialised(_: Any, tensors: Mapping[str, torch.Tensor]) -> str:
    from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

    kinds = (UninitializedBuffer, UninitializedParameter)
    lazy = [name for name, tensor in tensors.items() if isinstance(tensor, kinds)]
    return f"the shape of some weights is only known once the checkpoint is read ({_some(lazy)})" if lazy else ""


def _offload(vllm_config: Any, tensors: Mapping[str, torch.Tensor]) -> str:
    marked = [name for name, tensor in tensors.items() if getattr(tensor, "_vllm_is_uva_offloaded", False)]
    if marked:
        return f"CPU offload keeps weights outside the device ({_some(marked)})"
    offload = getattr(vllm_config, "offload_config", None)
    if offload is None:
        return ""
    if offload.uva.cpu_offload_gb > 0:
        return f"CPU offload is on (cpu_offload_gb = {offload.uva.cpu_offload_gb:g})"
    if offload.prefetch.offload_group_size > 0:
        return f"CPU offload is on (offload_group_size = {offload.prefetch.offload_group_size})"
    return ""


def _subclasses(_: Any, tensors: Mapping[str, torch.Tensor]) -> str:
    import torch

    # vLLM's parameter classes only add loading rules to a plain tensor. Those of torchao hold several tensors.
    special = {name: type(t.data).__name__ for name, t in tensors.items() if type(t.data) is not torch.Tensor}
    special = {name: kind for name, kind in special.items() if hasattr(tensors[name].data, "__tensor_flatten__")}
    some = [f"{name}: {kind}" for name, kind in special.items()]
    return f"some weights are tensors of a special class ({_some(some)})" if some else ""


def _quantisation(model_config: Any) -> str:
    method = model_config.quantization
    if method in ("bitsandbytes", "torchao"):
        return f"quantisation {method} fills its weights in its own way while loading"
    return ""


def _moving_experts(vllm_config: Any, _: Mapping[str, torch.Tensor]) -> str:
    parallel = vllm_config.parallel_config
    if getattr(parallel, "enable_elastic_ep", False):
        return "elastic expert parallelism moves experts between ranks at run time"
    if parallel.enable_eplb or moving_experts(vllm_config):
        return "expert load balancing (EPLB) moves experts between ranks at run time"
    return ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


_CHECKS: tuple[Callable[[Any, Mapping[str, torch.Tensor]], str], ...] = (
    _moving_experts,
    _offload,
    _uninitialised,
    _subclasses,
)
