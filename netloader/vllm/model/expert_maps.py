"""Maps from the experts of a model to the places where they are held, as text that two instances can compare.

Two engines of equal sizes may place experts differently: then row 0 of a layer's weights is another expert's, and a
pull would succeed and make a wrong model. What decides is either configuration (of vLLM Ascend, in `additional_config`)
or a tensor that the construction of a layer fills from it. Both are compared before a byte moves.

Which tensors those are is a list of names (EXPERT_MAPS), because nothing else tells them from weights:

- Not their type: weights of quantised models are whole numbers, too, and are memory that nobody has written when the
  model is built.
- Not that they are buffers: vLLM keeps some maps as buffers, and its Gemma-4 draft keeps a table of the checkpoint as
  one. vLLM Ascend keeps maps as plain attributes, and vLLM's sparse attention keeps room for indices there, of a size
  that differs from engine to engine.
- Not the class of the layer: vLLM and vLLM Ascend have several, and move the maps between them from release to release.

A map of another name is not compared by itself. It is still compared by what it was made from: the parallel sizes, the
placement strategy, and what `configured_experts` tells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netloader.vllm.model.digest import digest_of
from netloader.vllm.model.quantisation import contents_of
from netloader.vllm.model.registered import buffers_of

if TYPE_CHECKING:
    import torch

__all__ = ["EXPERT_MAPS", "configured_experts", "expert_maps", "moving_experts", "unreadable_map"]

EXPERT_MAPS = (
    # vLLM
    "_expert_map",
    "expert_mask",
    "expert_global_to_physical",
    "expert_physical_to_global",
    "expert_local_to_global",
    # vLLM Ascend
    "global_expert_map",
    "log2phy",
)
"""Attributes of a layer, tensors or None, that say which expert is where; the construction of the layer fills them."""


def configured_experts(vllm_config: Any) -> str:
    """What the user told vLLM Ascend about the placement of experts, by content; empty when nothing."""
    additional, balancing = _additional(vllm_config)
    told = {
        "map": contents_of(Path(path)) if (path := _map_path(balancing)) else None,
        "redundant": balancing.get("num_redundant_experts"),
        "shared": additional.get("mix_placement"),
    }
    told = {name: value for name, value in told.items() if value}
    return f"configured {_digest(json.dumps(told, sort_keys=True, default=str))}" if told else ""


def unreadable_map(vllm_config: Any) -> str:
    """The path of an expert map that is configured and can't be read, so that it can't be compared; else empty."""
    path = _map_path(_additional(vllm_config)[1])
    return path if path and contents_of(Path(path)) is None else ""


def moving_experts(vllm_config: Any) -> bool:
    """Whether vLLM Ascend moves experts between ranks at run time."""
    # It moves them also where it is only told to record the maps; earlier releases have these settings at the top.
    return any(
        settings.get(name)
        for settings in _additional(vllm_config)
        for name in ("dynamic_eplb", "expert_map_record_path")
    )


def expert_maps(model: torch.nn.Module) -> str:
    """A digest over all maps that the layers of a model hold, by name; empty when they hold none.

    To be taken when the model is built: what a map says then follows from the configuration alone.
    """
    found = {name: digest_of(tensor) for name, tensor in _maps(model)}
    return f"maps {_digest(json.dumps(found, sort_keys=True))}" if found else ""


def _maps(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    for prefix, module in model.named_modules():
        held = {**vars(module), **dict(buffers_of(module))}  # not properties of these names
        for name in EXPERT_MAPS:
            value = held.get(name)
            if isinstance(value, torch.Tensor):
                yield f"{prefix}.{name}", value


def _additional(vllm_config: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The configuration for packages beside vLLM, and the part of it about balancing experts."""
    additional = getattr(vllm_config, "additional_config", None)
    if not isinstance(additional, Mapping):
        return {}, {}
    balancing = additional.get("eplb_config")
    return additional, balancing if isinstance(balancing, Mapping) else {}


def _map_path(balancing: Mapping[str, Any]) -> str:
    return str(balancing.get("expert_map_path") or "")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
