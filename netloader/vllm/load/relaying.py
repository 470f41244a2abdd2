"""Passing weights on while they are pulled (RELAY), and ending that before anything else changes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from netloader.vllm.load.inspect_engine import Context
from netloader.vllm.serve.guard import serving_only

__all__ = ["relayed", "withdraw"]


@contextmanager
def relayed(context: Context, parents: Sequence[str]) -> Iterator[None]:
    """Pass on what was pulled until the block ends, because vLLM may change any tensor after that.

    Clients that are not done get RELAY_GRACE seconds more, unless the block ends with an error.

    Args:
        context: What was known before the model was built.
        parents: Addresses of the sources that sent blocks.
    """
    grace = 0.0
    try:
        yield
        grace = context.config.relay_grace
    finally:
        withdraw(context, parents, "its owner prepares the weights for use", grace)


def withdraw(context: Context, parents: Sequence[str], reason: str, grace: float = 0.0) -> None:
    """Stop passing on what was pulled. Clients that are not done are redirected to `parents`."""
    server = context.server
    if server is not None:
        with serving_only("passing on what was pulled", server, [context.role]):
            server.withdraw(context.role, reason, grace=grace, sources=tuple(parents))
