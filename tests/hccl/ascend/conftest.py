"""These tests need the released vllm-ascend beside vLLM: `make coexist` runs them."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("vllm_ascend") is not None else ["test_*.py"]
