"""What is registered with one module itself, by its own names: the one place that asks torch's private tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = ["buffers_of", "computed_names", "parameters_of", "unset_names", "weights_of"]


def parameters_of(module: Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Its parameters, also those that have several names."""
    # Of the base class: a model may answer otherwise about itself.
    return torch.nn.Module.named_parameters(module, recurse=False, remove_duplicate=False)


def buffers_of(module: Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Its buffers, computed ones included, also those that have several names."""
    return torch.nn.Module.named_buffers(module, recurse=False, remove_duplicate=False)


def weights_of(module: Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Its parameters and persistent buffers: what a checkpoint has."""
    yield from parameters_of(module)
    computed = computed_names(module)
    yield from ((name, buffer) for name, buffer in buffers_of(module) if name not in computed)


def computed_names(module: Module) -> set[str]:
    """The names of its buffers that are in no checkpoint: torch's own set, which may be changed."""
    return module._non_persistent_buffers_set  # noqa: SLF001 - torch has no other way to ask


def unset_names(module: Module) -> Iterator[str]:
    """The names under which it has a parameter or a buffer that is None."""
    for table in (module._parameters, module._buffers):  # noqa: SLF001 - the public views hide them
        yield from (name for name, tensor in table.items() if tensor is None)
