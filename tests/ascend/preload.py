"""Imports vLLM with the simulator in place of torch_npu and with vllm-ascend as its platform, and starts nothing."""

from __future__ import annotations

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
