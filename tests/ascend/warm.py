"""Imports also what an engine would import when it starts: the worker, then its patches, then models, in that order.

For a process that forks engines. `tests.ascend.test_loads` compares such an engine with one in a fresh process.
"""

from __future__ import annotations

from tests.ascend import preload  # noqa: F401 - first of all

# isort: split
from vllm.model_executor.models import ModelRegistry
from vllm_ascend.utils import adapt_patch
from vllm_ascend.worker import worker  # noqa: F401

from tests.ascend import engine, outcomes  # noqa: F401

adapt_patch()

_ARCHITECTURES = (
    "LlamaForCausalLM",
    "EagleLlamaForCausalLM",
    "Qwen3MoeForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepSeekMTPModel",
)
for _name in _ARCHITECTURES:
    # Else vLLM examines each class in a process of its own, which has to import everything once more.
    ModelRegistry.register_model(_name, ModelRegistry.models[_name].load_model_cls())
