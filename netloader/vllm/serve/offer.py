"""Last step of a load: the worker's server offers the chosen layout, or refuses the model with the reason."""

from __future__ import annotations

import logging

from netloader.vllm.serve.choose_layout import Choice
from netloader.vllm.serve.serving import WorkerServer

__all__ = ["serve"]

log = logging.getLogger(__name__)


def serve(server: WorkerServer, rank: int, choice: Choice) -> None:
    """Offer the chosen layout, and tell clients why the other layouts are not served.

    Args:
        server: The worker's server.
        rank: The worker's rank, for the log.
        choice: What is served of a model.

    Raises:
        ServerLost: The server does not answer, and was ended.
    """
    role, (reason, hint) = choice.role, choice.refusal
    if choice.holding is None:
        log.warning("netloader: rank %d does not serve its %s: %s (%s)", rank, role, reason, hint)
        server.refuse(role, reason, hint)
        return
    server.offer(choice.holding, choice.detail)
    if reason:
        log.info("netloader: rank %d: %s: no raw layout: %s (%s)", rank, role, reason, hint)
        server.refuse(role, f"{reason}; the processed layout is held", hint, layouts=("raw",))
