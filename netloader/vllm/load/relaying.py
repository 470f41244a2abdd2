"""Passing weights on while they are pulled (RELAY), and its end before anything else may change them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from netloader.vllm.load.inspect_engine import Context
from netloader.vllm.load.pull_weights import Pulled
from netloader.vllm.serve.guard import serving_only

__all__ = ["passed_on", "withdraw"]


@contextmanager
def passed_on(context: Context, pulled: Pulled) -> Iterator[None]:
    """Pass on what was pulled until the block ends, because vLLM may change any tensor after that.

    Clients that are not done get RELAY_GRACE seconds more, unless the block ends with an error.
    """
    grace = 0.0
    try:
        yield
        grace = context.config.relay_grace
    finally:
        withdraw(context, pulled, "its owner prepares the weights for use", grace)


def withdraw(context: Context, pulled: Pulled, reason: str, grace: float = 0.0) -> None:
    """Stop passing on what was pulled. Clients in the middle are told where it came from."""
    server = context.server
    if server is not None:
        with serving_only("passing on what was pulled", server, [context.role]):
            server.withdraw(context.role, reason, grace=grace, sources=pulled.parents)
