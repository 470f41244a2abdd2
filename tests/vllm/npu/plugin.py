"""The function that the entry point names. vLLM calls it before it imports the platform."""

from __future__ import annotations


def platform() -> str:
    """Where the class of the platform is."""
    return "tests.vllm.npu.platform.NpuPlatform"
