"""Contents of the tensors of a model that no checkpoint fills, which are put back if a pull is not kept.

A model that is built again does not always compute them again: vLLM shares rotary embeddings among all models of a
process that have the same settings, and vllm-ascend refers to the cache of the first one. The target of a draft
computes with them already. So the contents are copied back into the same memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from netloader.vllm.model.initial_values import InitialValues
from netloader.vllm.model.object_walk import outside
from netloader.vllm.model.registered import buffers_of, computed_names, parameters_of

if TYPE_CHECKING:
    import torch

__all__ = ["ComputedValues"]


@dataclass(frozen=True)
class _Place:
    """A buffer, and the module that had it under this name."""

    module: torch.nn.Module
    name: str
    tensor: torch.Tensor
    persistent: bool


class ComputedValues:
    """All tensors of a model except its parameters, with their contents now.

    Each is copied whole, on its device: these are caches and scales, which are small beside the weights. A tensor that
    shares memory with a parameter is left out. It may be as large as a weight, and the checkpoint fills it.

    Args:
        model: The model, as vLLM has built it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        found = outside(model)
        modules = [*model.modules(), *found.modules.values()]
        weights = {_memory(tensor) for module in modules for _, tensor in parameters_of(module) if _has_memory(tensor)}
        self._places = [
            _Place(module, name, tensor, name not in computed_names(module))
            for module in modules
            for name, tensor in buffers_of(module)
        ]
        tensors = {id(t): t for t in [*(place.tensor for place in self._places), *found.tensors.values()]}
        # A second reference to the memory, because post-processing may give a tensor other memory (`tensor.data = x`).
        self._tensors = [
            (tensor, tensor.detach())
            for tensor in tensors.values()
            if _has_memory(tensor) and _memory(tensor) not in weights
        ]
        contents = {str(place): _without_repeats(data) for place, (_, data) in enumerate(self._tensors)}
        self._contents = InitialValues(contents, contents)

    def restore(self) -> None:
        """Put the contents back in place, and every buffer back into its module. A second call does nothing."""
        self._contents.restore()
        for tensor, data in self._tensors:
            if _layout(tensor) != _layout(data):
                tensor.data = data
        for place in self._places:
            if dict(buffers_of(place.module)).get(place.name) is not place.tensor:
                if hasattr(place.module, place.name):
                    delattr(place.module, place.name)
                place.module.register_buffer(place.name, place.tensor, place.persistent)
        # The modules hold weights, whose memory has to be free before the model is built again.
        self._contents, self._tensors, self._places = InitialValues({}), [], []


def _has_memory(tensor: torch.Tensor) -> bool:
    from torch.nn.parameter import is_lazy

    return not is_lazy(tensor) and not tensor.is_meta and tensor.numel() > 0


def _memory(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _without_repeats(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that has memory of its own: torch does not write into an expanded one."""
    return tensor[tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())]
