"""Parameters and buffers of one module, without its submodules. Only this file reads torch's private tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = ["EXPERT_MAPS", "buffers_of", "computed_names", "is_expert_map", "parameters_of", "unset_names", "weights_of"]

EXPERT_MAPS = frozenset(
    (
        # vLLM
        *("_expert_map", "expert_mask", "expert_substitution_routes"),
        *("expert_global_to_physical", "expert_physical_to_global", "expert_local_to_global"),
        # vLLM Ascend
        *("global_expert_map", "log2phy"),
    )
)
"""Attributes of a layer, tensors or None, with the places of experts. The constructor of the layer fills them."""


def is_expert_map(name: str, tensor: torch.Tensor) -> bool:
    """Whether the attribute `name` of a module, a tensor, says where experts are."""
    return name in EXPERT_MAPS and not (tensor.is_floating_point() or tensor.is_complex())


def parameters_of(module: Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of the module, under every name."""
    # The method of the base class is called, because a model may override it.
    return torch.nn.Module.named_parameters(module, recurse=False, remove_duplicate=False)


def buffers_of(module: Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers of the module, under every name, including computed ones."""
    return torch.nn.Module.named_buffers(module, recurse=False, remove_duplicate=False)


def weights_of(module: Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and persistent buffers of the module: the tensors that a checkpoint has.

    Maps of experts are left out: they follow from the configuration, and are in no checkpoint, however registered.
    """
    computed = computed_names(module)
    buffers = ((name, buffer) for name, buffer in buffers_of(module) if name not in computed)
    yield from ((n, tensor) for n, tensor in [*parameters_of(module), *buffers] if not is_expert_map(n, tensor))


def computed_names(module: Module) -> set[str]:
    """Names of the buffers that are in no checkpoint. This is torch's own set; a caller may change it."""
    return module._non_persistent_buffers_set  # noqa: SLF001 - torch has no public name for it


def unset_names(module: Module) -> Iterator[str]:
    """Names of the parameters and buffers of the module that are None."""
    for table in (module._parameters, module._buffers):  # noqa: SLF001 - the public views hide them
        yield from (name for name, tensor in table.items() if tensor is None)
