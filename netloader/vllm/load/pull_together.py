"""Third and fourth step of a load: pull and agree. With ORIGIN=lease, both again if a source or the origin has died."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from netloader.vllm.load.agree_ranks import Decision, agree
from netloader.vllm.load.choose_origin import loads_from_storage
from netloader.vllm.load.examine_model import Built
from netloader.vllm.load.inspect_engine import Context
from netloader.vllm.load.pull_weights import Pulled, pull
from netloader.vllm.load.relaying import withdraw

if TYPE_CHECKING:
    import torch

__all__ = ["pull_together"]

log = logging.getLogger(__name__)

_TRIES = 5
"""Most pulls of one load. What decides about another one is known to all ranks, so a time can't bound them."""


def pull_together(context: Context, built: Built, model: torch.nn.Module) -> tuple[Pulled, Decision]:
    """Pull the weights, and decide with the other ranks whether they are kept.

    With ORIGIN=lease, a failed pull is no reason to read storage at once: another engine may be doing so by now.

    Raises:
        AgreementError: Another rank ended, or did not report in time.
        MemoryStillInUse: A thread may still write into this rank's weights.
    """
    began = time.monotonic() - context.seconds
    pulled = pull(context, built, model)
    for left in reversed(range(_TRIES)):
        with pulled.restored_on_error():
            try:
                decision = agree(context, pulled)
            except BaseException:
                withdraw(context, pulled.parents, "its owner prepares the weights for use")
                raise
            if not left or not _again(context, decision):
                break
            log.info(
                "netloader: rank %d: asking again who loads the %s: %s", context.rank, context.role, decision.why_not
            )
            withdraw(context, pulled.parents, "its owner pulls anew")
            context = replace(context, seconds=time.monotonic() - began)
            why = _why_storage(context, built)
            if why:
                return pulled, replace(decision, why_not=f"{decision.why_not}; {why}")
            # If its structure is that of processed weights now, only the default loader can fill it.
            if not pulled.rebuild:
                pulled = pull(context, built, model, pulled.initial)
    return pulled, decision


def _again(context: Context, decision: Decision) -> bool:
    """Whether another pull may succeed. The same at all ranks."""
    config = context.config
    failed = any(report.outcome == "failed" for report in decision.reports)
    return config.origin == "lease" and config.fallback and context.registry is not None and failed


def _why_storage(context: Context, built: Built) -> str:
    if context.registry is None:
        return "there is no DISCOVERY"
    identity = built.identity if context.probed is None else context.probed.identity
    left = max(0.0, context.config.wait - context.seconds)
    return loads_from_storage(
        context.registry,
        context.server,
        identity,
        lambda: False,
        role=context.role,
        rank=context.rank,
        wait=left,
    )
