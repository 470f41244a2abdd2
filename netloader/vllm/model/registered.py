"""Parameters and buffers of one module, without its submodules. Only this file reads torch's private tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = ["buffers_of", "computed_names", "parameters_of", "unset_names", "weights_of"]


def parameters_of(module: Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of the module, under every name."""
    # The method of the base class is called, because a model may override it.
    return torch.nn.Module.named_parameters(module, recurse=False, remove_duplicate=False)


def buffers_of(module: Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers of the module, under every name, including computed ones."""
    return torch.nn.Module.named_buffers(module, recurse=False, remove_duplicate=False)


def weights_of(module: Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and persistent buffers of the module: the tensors that a checkpoint has."""
    yield from parameters_of(module)
    computed = computed_names(module)
    yield from ((name, buffer) for name, buffer in buffers_of(module) if name not in computed)


def computed_names(module: Module) -> set[str]:
    """Names of the buffers that are in no checkpoint. This is torch's own set; a caller may change it."""
    return module._non_persistent_buffers_set  # noqa: SLF001 - torch has no public name for it


def unset_names(module: Module) -> Iterator[str]:
    """Names of the parameters and buffers of the module that are None."""
    for table in (module._parameters, module._buffers):  # noqa: SLF001 - the public views hide them
        yield from (name for name, tensor in table.items() if tensor is None)
