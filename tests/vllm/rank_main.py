"""One rank of `harness.run_ranks`: `python -m tests.vllm.rank_main TASK`, where TASK is JSON."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

from tests.vllm.harness import run_rank_task


def resolve(target: str) -> Callable[..., Any]:
    """The function that "package.module:name" names."""
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


if __name__ == "__main__":
    print(run_rank_task(json.loads(sys.argv[1]), resolve), flush=True)
