"""Imports all that an engine of vllm-ascend needs, with the simulator in place of torch_npu, and starts nothing."""

from __future__ import annotations

import importlib

import torch_npu  # before vLLM asks for its platform

if torch_npu.__version__ != "0.0.sim":
    raise RuntimeError(f"these tests need the simulated torch_npu, found {torch_npu.__version__}")

from vllm.platforms import current_platform
from vllm_ascend.platform import NPUPlatform

if type(current_platform) is not NPUPlatform:
    raise RuntimeError(f"vLLM has chosen {type(current_platform)} as its platform")

# torch has no pinned memory for a device that is implemented in Python. Modules of vLLM ask while they are imported.
NPUPlatform.is_pin_memory_available = classmethod(lambda cls: False)

from vllm.plugins import load_general_plugins  # noqa: E402

load_general_plugins()

_MODELS = ("deepseek_mtp", "deepseek_v2", "llama_eagle", "qwen3_moe")
for _name in ("vllm_ascend.worker.worker", *(f"vllm.model_executor.models.{model}" for model in _MODELS)):
    importlib.import_module(_name)
