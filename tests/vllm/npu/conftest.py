"""These tests run vLLM on a simulated device, in a process of their own: see `tests.vllm.test_npu`."""

from __future__ import annotations

import importlib.util
import os

collect_ignore_glob = []
if os.environ.get("NETLOADER_NPU_SIM") != "1" or importlib.util.find_spec("torch_npu") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import torch_npu  # before vLLM asks for its platform

    if torch_npu.__version__ != "0.0.sim":
        raise RuntimeError(f"these tests need the simulated torch_npu, found {torch_npu.__version__}")
