"""Draft models of speculative decoding, and what they share with their target.

vLLM's proposer replaces the embeddings and the output head of most drafts by those of the target, after both were
loaded. What the draft's own loading did not fill is replaced in any case: it is memory that nobody wrote, so it is
neither served nor pulled. What was filled and equals the target's is dropped as well: the target's stands in for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from netloader.core.identity import Role

__all__ = ["left_out", "named_like_target", "shares_with_target"]

_EMBEDDINGS = "model.embed_tokens."
_HEAD = "lm_head."
_LAYERS = "model.layers."
_HEAD_OF_LAYER = "shared_head.head."


def shares_with_target(vllm_config: Any, role: Role) -> bool:
    """Whether this is a draft whose proposer shares the target's tensors with it: all but `draft_model`'s do."""
    speculative = getattr(vllm_config, "speculative_config", None)
    return role == "draft" and speculative is not None and bool(speculative.use_eagle())


def left_out(names: Iterable[str], state: Mapping[str, bool], *, pp_size: int) -> frozenset[str]:
    """Names of a sharing draft's tensors that its loading does not fill, and the proposer replaces by the target's.

    Args:
        names: All raw tensors of the draft.
        state: What loading noted: only an explicit "no" leaves something out. Drafts that note nothing (MTP) are filled
            from the target's checkpoint.
        pp_size: Pipeline stages: with several, each model keeps its own embeddings.
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
    """Whether MODEL names this model: the target, and a draft that lies in the target's own checkpoint (MTP)."""
    if role == "target":
        return True
    target = getattr(getattr(vllm_config, "speculative_config", None), "target_model_config", None)
    return target is not None and target.model == model_config.model
