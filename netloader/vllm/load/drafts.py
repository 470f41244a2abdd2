"""Draft models of speculative decoding, and what they share with their target.

After both models are loaded, vLLM's proposer replaces the embeddings and the output head of most drafts by those of the
target. It always replaces tensors that the draft's own loading did not fill. These hold uninitialised memory, so they
are neither served nor pulled. It also drops a filled tensor that equals the target's. The server then serves the
target's tensor in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from netloader.core.identity import Role

__all__ = ["left_out", "named_like_target", "served_name", "shares_with_target"]

_EMBEDDINGS = "model.embed_tokens."
_HEAD = "lm_head."
_LAYERS = "model.layers."
_HEAD_OF_LAYER = "shared_head.head."


def shares_with_target(vllm_config: Any, role: Role) -> bool:
    """Whether this is a draft that shares tensors with its target. All methods but `draft_model` do so."""
    speculative = getattr(vllm_config, "speculative_config", None)
    return role == "draft" and speculative is not None and bool(speculative.use_eagle())


def left_out(names: Iterable[str], state: Mapping[str, bool], *, pp_size: int) -> frozenset[str]:
    """Names of the tensors of a draft that its loading does not fill, because the proposer uses the target's.

    Args:
        names: All raw tensors of a draft that shares tensors with its target.
        state: Facts that loading set on the model. A tensor is left out only if a fact is False. Drafts without such
            facts (MTP) are filled from the target's checkpoint.
        pp_size: Number of pipeline stages. With more than one, each model keeps its own embeddings.
    """
    embeddings = state.get("has_own_embed_tokens") is False and pp_size == 1
    head = state.get("has_own_lm_head") is False
    return frozenset(
        name for name in names if (embeddings and name.startswith(_EMBEDDINGS)) or (head and _is_of_head(name))
    )


def _is_of_head(name: str) -> bool:
    if name.startswith(_HEAD):
        return True
    _, _, within_layer = name.removeprefix(_LAYERS).partition(".")
    return name.startswith(_LAYERS) and within_layer.startswith(_HEAD_OF_LAYER)


def named_like_target(vllm_config: Any, model_config: Any, role: Role) -> bool:
    """Whether MODEL is the name of this model: of the target, and of a draft in the target's checkpoint (MTP)."""
    if role == "target":
        return True
    target = _target_of(vllm_config)
    return target is not None and target.model == model_config.model


def served_name(vllm_config: Any, model_config: Any, role: Role) -> str | None:
    """`--served-model-name`, if it is the name of this model; None if not."""
    named = model_config if role == "target" else _target_of(vllm_config)
    if named is None or not named_like_target(vllm_config, model_config, role):
        return None
    name = getattr(named, "served_model_name", None)
    return name if isinstance(name, str) else None


def _target_of(vllm_config: Any) -> Any:
    return getattr(getattr(vllm_config, "speculative_config", None), "target_model_config", None)
