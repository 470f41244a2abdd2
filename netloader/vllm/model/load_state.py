"""Attributes that a model's own loading sets beside tensors.

Some models set attributes while they load, depending on the names in the checkpoint. For example, a draft model sets
whether the checkpoint has embeddings for it. A client that pulls does not run that code. A list names the attributes
that a client takes over from its source. If loading sets any other attribute, raw tensors alone would give a different
model, and they are not offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["TRANSFERRED_FACTS", "apply_load_state", "load_state_of"]

TRANSFERRED_FACTS = ("has_own_embed_tokens", "has_own_lm_head")
"""Attributes of the model itself that a client takes over; each is a bool."""


def load_state_of(model: torch.nn.Module) -> dict[str, bool]:
    """The listed attributes that `model` has."""
    return {name: bool(getattr(model, name)) for name in TRANSFERRED_FACTS if hasattr(model, name)}


def apply_load_state(model: torch.nn.Module, state: Mapping[str, bool]) -> None:
    """Set the attributes that a source announced: only listed ones, and only those that the model has."""
    for name in TRANSFERRED_FACTS:
        if name in state and hasattr(model, name):
            setattr(model, name, bool(state[name]))
