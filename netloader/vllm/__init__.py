"""The vLLM adapter: the only room that knows vLLM, and it imports vLLM inside functions only."""

from __future__ import annotations
