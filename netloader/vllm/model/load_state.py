"""What a model's own loading sets beside tensors.

Some models note plain facts while they load, by looking at the names in the checkpoint: whether a draft model came
with embeddings of its own, for example. A client that pulls never runs that code. The facts it may take over are on a
list; where loading sets anything that is not on it, the raw tensors alone would make another model, and they are not
offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["TRAVELS", "PlainState", "apply_load_state", "load_state_of"]

TRAVELS = ("has_own_embed_tokens", "has_own_lm_head")
"""Attributes of the model itself that a client takes over; each a bool."""

_PLAIN = (bool, int, float, str, type(None))
_Value = bool | int | float | str | None


def load_state_of(model: torch.nn.Module) -> dict[str, bool]:
    """The facts on the list that `model` has."""
    return {name: bool(getattr(model, name)) for name in TRAVELS if hasattr(model, name)}


def apply_load_state(model: torch.nn.Module, state: Mapping[str, bool]) -> None:
    """Set the facts that a source stated; only those on the list, and only where the model knows them."""
    for name in TRAVELS:
        if name in state and hasattr(model, name):
            setattr(model, name, bool(state[name]))


class PlainState:
    """The plain attributes of all modules at one moment, to find out what loading changed.

    Args:
        model: The model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._before = _plain_attributes(model)

    def changed_by_loading(self, model: torch.nn.Module) -> list[str]:
        """Names of plain attributes that differ now and cannot travel; sorted."""
        after = _plain_attributes(model)
        changed = {name for name in self._before.keys() | after.keys() if self._before.get(name) != after.get(name)}
        return sorted(changed - set(TRAVELS))


def _plain_attributes(model: torch.nn.Module) -> dict[str, _Value]:
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if not name.startswith("__") and isinstance(value, _PLAIN)
    }
