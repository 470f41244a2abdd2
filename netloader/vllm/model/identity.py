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
    """Whether this is the draft model of speculative decoding, or the target."""
    return "draft" if getattr(model_config, "runner_type", "") == "draft" else "target"


def fingerprint_of_model(model_config: Any) -> str:
    """Fingerprint of the files that this model is loaded from; empty where there are none on this host (yet)."""
    path = _folder(model_config)
    return "" if path is None else fingerprint_of(path)


def _folder(model_config: Any) -> Path | None:
    """Where the model's files are; None where there are none on this host (yet)."""
    path = Path(str(model_config.model))
    return path if path.exists() else _downloaded(str(model_config.model), model_config.revision)


def _downloaded(name: str, revision: str | None) -> Path | None:
    """The folder of a model that was fetched from a hub by its name; None when it was not. Asks nobody."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except (HFValidationError, ValueError):
        return None  # no name of a hub: an address of some object store
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
    """Everything that has to match before raw tensors are sent.

    Args:
        model_config: vLLM's configuration of the model.
        topology: This worker's place.
        name: MODEL of the configuration, where it names this model; None to go by vLLM's ``model``.
        tied: Whether the embeddings are tied, where weight files said so.
        cache_config: vLLM's configuration of its KV cache, whose type may decide which scales a model has.
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
