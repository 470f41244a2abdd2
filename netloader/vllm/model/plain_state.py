"""The plain values of a model at one moment, to determine what loading changes beside tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from netloader.vllm.model.object_walk import plain_values

if TYPE_CHECKING:
    import torch

__all__ = ["PlainState"]


class PlainState:
    """The plain values that the modules of a model hold, also in lists, mappings and objects, at one moment.

    Args:
        model: The model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._before = plain_values(model)

    def changed_by_loading(self, model: torch.nn.Module) -> list[str]:
        """Sorted names of the values that have changed and that a client does not take over."""
        after = plain_values(model)
        return sorted(name for name in self._before.keys() | after.keys() if self._before.get(name) != after.get(name))
