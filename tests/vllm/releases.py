"""Features of the installed vLLM. tests/vllm runs with the oldest and the newest supported release."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from netloader.vllm.model.post_processing import possible

__all__ = ["KNOWS_PROCESSED", "LOOKS_FOR_HEAD", "PACKS_EXPERTS", "needs_head_search", "reload_in_place"]


def _looks_for_head() -> bool:
    from vllm.transformers_utils import config

    return hasattr(config, "checkpoint_has_lm_head")


KNOWS_PROCESSED = possible()
"""Whether this vLLM supports weights that are processed already."""

LOOKS_FOR_HEAD = _looks_for_head()
"""Whether this vLLM looks into weight files to decide whether embeddings are tied. Older ones use config.json."""

PACKS_EXPERTS = importlib.util.find_spec("vllm.model_executor.layers.fused_moe.cpu_fused_moe") is None
"""Whether this vLLM packs experts' weights on every CPU. Older ones have no kernel for CPUs without AVX-512."""

needs_head_search = pytest.mark.skipif(not LOOKS_FOR_HEAD, reason="this vLLM takes the word of config.json on tying")


def reload_in_place(
    config: Any, model: torch.nn.Module, path: str | None = None, *, is_checkpoint_format: bool = True
) -> None:
    """What a worker's `reload_weights` does, without a worker."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(config), _reload() as reload:
        reload(config, model, None, path, is_checkpoint_format)


@contextmanager
def _reload() -> Iterator[Any]:
    try:
        from vllm.model_executor.model_loader.reload.inplace import reload_weights
    except ImportError:
        # In an older release it is a method of the model runner, which reads only these attributes.
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        def reload_weights(config: Any, model: torch.nn.Module, *arguments: Any) -> None:
            runner: Any = SimpleNamespace(
                get_model=lambda: model, load_config=config.load_config, model_config=config.model_config
            )
            GPUModelRunner.reload_weights(runner, *arguments)

    yield reload_weights
