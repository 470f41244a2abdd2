"""Reloads of live models in this process, and comparisons of a model before and after."""

from __future__ import annotations

from typing import Any

import torch

from netloader.vllm.live.reloading import finish_reload
from tests.models import ModelStore
from tests.vllm import harness
from tests.vllm.pulls import extra
from tests.vllm.releases import reload_in_place


def config_of(models: ModelStore, kind: str, *sources: str, **settings: Any) -> Any:
    """The configuration of a client that may reload from `sources`."""
    return harness.engine_config(models.bare(kind), load_format="netloader", extra=extra(sources, **settings))


def reload(model: torch.nn.Module, config: Any, *, finish: bool = True, is_checkpoint_format: bool = True) -> None:
    """What a worker's `reload_weights` does.

    Args:
        model: The live model.
        config: vLLM's configuration.
        finish: Whether to run the part of our wrapper that follows the worker's method.
        is_checkpoint_format: The argument of vLLM's worker.
    """
    with torch.inference_mode():
        reload_in_place(config, model, is_checkpoint_format=is_checkpoint_format)
        if finish:
            finish_reload(model)


def outputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The output of every linear layer for one input. This also covers weights in an opaque handle."""
    found = {}
    for name, module in model.named_modules():
        size = getattr(module, "input_size_per_partition", getattr(module, "input_size", None))
        method = getattr(module, "quant_method", None)
        if size is not None and method is not None and hasattr(method, "apply"):
            x = torch.linspace(-1, 1, 2 * size, dtype=torch.bfloat16).view(2, size)
            found[name] = method.apply(module, x, None).float().clone()
    return found


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def damage(model: torch.nn.Module) -> None:
    """Overwrite every live parameter that is not empty."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel():
                parameter.fill_(0.25)
