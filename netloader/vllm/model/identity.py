"""The identity of a model that vLLM is about to load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from netloader.checkpoint import fingerprint_of
from netloader.core.identity import ModelIdentity, Role
from netloader.vllm.model.quantisation import quantisation_text
from netloader.vllm.model.topology import Topology

__all__ = ["fingerprint_of_model", "identity_of", "role_of"]


def role_of(model_config: Any) -> Role:
    """Whether the model is the target or the draft of speculative decoding."""
    return "draft" if getattr(model_config, "runner_type", "") == "draft" else "target"


def fingerprint_of_model(model_config: Any) -> str:
    """Fingerprint of the model's files; empty when there are none on this host (yet)."""
    path = _folder(model_config)
    return "" if path is None else fingerprint_of(path)


def _folder(model_config: Any) -> Path | None:
    """The folder of the model's files; None when there is none on this host (yet)."""
    path = Path(str(model_config.model))
    return path if path.exists() else _downloaded(str(model_config.model), model_config.revision)


def _downloaded(name: str, revision: str | None) -> Path | None:
    """The folder of a model that was downloaded from a hub; None when it was not. Uses no network."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except (HFValidationError, ValueError):
        return None  # not the name of a model on a hub, but for example the URL of an object store
    return Path(found).parent if isinstance(found, str) else None


def identity_of(
    model_config: Any,
    topology: Topology,
    *,
    name: str | None,
    tied: bool | None,
    cache_config: Any = None,
    load_config: Any = None,
) -> ModelIdentity:
    """The identity of a model: everything that must match before raw tensors are sent.

    Args:
        model_config: vLLM's configuration of the model.
        topology: This worker's place in its engine.
        name: MODEL of the configuration, if it is the name of this model; None to use vLLM's ``model``.
        tied: Whether the embeddings are tied; None when it is not known.
        cache_config: vLLM's configuration of its KV cache. Its dtype may decide which scales a model has.
        load_config: How vLLM was told to load.
    """
    import vllm

    role = role_of(model_config)
    return ModelIdentity(
        model=str(model_config.model) if name is None else name,
        architecture=str(model_config.architecture),
        revision=str(model_config.revision or ""),
        dtype=str(model_config.dtype).removeprefix("torch."),
        quantization=str(model_config.quantization or ""),
        quantization_config=quantisation_text(model_config, cache_config, load_config, _folder(model_config)),
        layout="raw",
        role=role,
        tp_size=topology.tp_size,
        tp_rank=topology.tp_rank,
        pp_size=topology.pp_size,
        pp_rank=topology.pp_rank,
        ep_size=topology.ep_size,
        ep_rank=topology.ep_rank,
        expert_placement=topology.experts,
        tied=tied,
        engine=f"vllm {vllm.__version__}",
    )
