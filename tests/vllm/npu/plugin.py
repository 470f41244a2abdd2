"""What the entry point names: vLLM calls it before the platform may be imported."""

from __future__ import annotations


def platform() -> str:
    """Where the class of the platform is."""
    return "tests.vllm.npu.platform.NpuPlatform"
