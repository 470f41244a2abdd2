"""What is called in a worker that vllm-ascend's executor started: see `tests.ascend.host`."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch

from tests.ascend.engine import everything, models_of
from tests.vllm import harness

_raw: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()
"""The digests of each model's raw tensors."""


def record_raw_digests() -> None:
    """Of each model, from now on, between `load_weights` and post-processing."""
    from vllm.model_executor.model_loader import base_loader

    original = base_loader.process_weights_after_loading

    def observe(model: torch.nn.Module, *arguments: Any) -> None:
        _raw[model] = harness.raw_digests(model)
        original(model, *arguments)

    base_loader.process_weights_after_loading = observe


def compute_nothing() -> None:
    """Leave the profiling run out: there is no forward pass."""
    from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

    NPUModelRunner.profile_run = lambda self: None


def describe(wrapper: Any) -> dict[str, Any]:
    """A worker's place in its engine, its server's address, and the digests of its tensors."""
    from netloader.vllm.model.topology import topology_of
    from netloader.vllm.serve.serving import running_server

    worker = wrapper.worker
    config, models, server = worker.vllm_config, models_of(worker), running_server()
    return {
        "topology": dataclasses.asdict(topology_of(config, config.model_config)),
        "address": None if server is None else server.address,
        "digests": {
            "raw": {role: _raw[model] for role, model in models.items()},
            "final": {role: everything(model) for role, model in models.items()},
        },
    }
