"""Maps from the experts of a model to their places, as text that two engines can compare.

Two engines of equal sizes may place experts differently. Then row 0 of a layer's weights belongs to different experts,
and a pull would succeed and give a wrong model. The placement follows from configuration (of vLLM Ascend, in
`additional_config`, see :mod:`netloader.vllm.model.settings`), or from a tensor that the constructor of a layer fills.
Both are compared before the first byte. No such tensor is pulled.

The tensors are found by a list of names (EXPERT_MAPS), because no other property distinguishes them from weights:

- The dtype does not: weights of quantised models have integer dtypes too, and are uninitialised after the build.
- Being a buffer does not: vLLM has maps that are buffers, but its Gemma-4 draft has a table from the checkpoint as a
  buffer. vLLM Ascend has maps that are plain attributes, but vLLM's sparse attention has a workspace for indices as a
  plain attribute, whose size differs between engines.
- The class of the layer does not: vLLM and vLLM Ascend have several, and releases move the maps between them.

A map with another name is not compared directly. Its inputs are compared: the parallel sizes, the placement strategy,
and the settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from netloader.vllm.model.digest import digest_of
from netloader.vllm.model.registered import EXPERT_MAPS, buffers_of, is_expert_map, parameters_of

if TYPE_CHECKING:
    import torch

__all__ = ["expert_maps", "moving_experts"]


def moving_experts(vllm_config: Any) -> bool:
    """Whether vLLM Ascend moves experts between ranks at run time."""
    # It also moves them when it is configured to record the maps. Earlier releases have these settings at top level.
    return any(
        settings.get(name)
        for settings in _additional(vllm_config)
        for name in ("dynamic_eplb", "expert_map_record_path")
    )


def expert_maps(model: torch.nn.Module) -> str:
    """A digest over all expert maps in the layers of a model, by name; empty when there are none.

    Call it right after the model is built, when the contents of a map follow from the configuration alone.
    """
    found = {name: digest_of(tensor) for name, tensor in _maps(model)}
    return f"maps {_digest(json.dumps(found, sort_keys=True))}" if found else ""


def _maps(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    for prefix, module in model.named_modules():
        # Not `getattr`, which would call properties.
        held = {**vars(module), **dict(buffers_of(module)), **dict(parameters_of(module))}
        for name in sorted(EXPERT_MAPS & held.keys()):
            value = held[name]
            if isinstance(value, torch.Tensor) and is_expert_map(name, value):
                yield f"{prefix}.{name}", value


def _additional(vllm_config: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The configuration for packages beside vLLM, and the part of it about balancing experts."""
    additional = getattr(vllm_config, "additional_config", None)
    if not isinstance(additional, Mapping):
        return {}, {}
    balancing = additional.get("eplb_config")
    return additional, balancing if isinstance(balancing, Mapping) else {}


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
