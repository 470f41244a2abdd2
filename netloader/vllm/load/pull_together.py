"""Third and fourth step of a load: pull and agree. With ORIGIN=lease, both again if a source or the origin has died."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from netloader.client.origin import useless_after
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

_UNEXPLAINED = 5
"""Most pulls of one load that fail though the first rank knows no source of no use: another rank failed, say."""


def pull_together(context: Context, built: Built, model: torch.nn.Module) -> tuple[Pulled, Decision]:
    """Pull the weights, and decide with the other ranks whether they are kept.

    With ORIGIN=lease, a failed pull is no reason to read storage at once: another engine may be doing so by now. Who
    loads is asked anew until WAIT is over. The first rank knows that time, and tells the others.

    Raises:
        AgreementError: Another rank ended, or did not report in time.
        MemoryStillInUse: A thread may still write into this rank's weights.
    """
    began = time.monotonic() - context.seconds
    pulled = pull(context, built, model)
    useless, unexplained = frozenset[str](), 0
    while True:
        with pulled.restored_on_error():
            try:
                decision = agree(context, pulled)
            except BaseException:
                withdraw(context, pulled.parents, "its owner prepares the weights for use")
                raise
            if not _again(context, decision):
                return pulled, decision
            log.info(
                "netloader: rank %d: asking again who loads the %s: %s", context.rank, context.role, decision.why_not
            )
            withdraw(context, pulled.parents, "its owner pulls anew")
            context = replace(context, seconds=time.monotonic() - began)
            useless, unexplained = useless | _useless(pulled), unexplained + (pulled.left is None)
            over = f"{unexplained} pulls could not be kept" if unexplained >= _UNEXPLAINED else ""
            why = _why_storage(context, built, useless, over)
            if why:
                return pulled, replace(decision, why_not=f"{decision.why_not}; {why}")
            if not pulled.rebuild:  # it has processed weights, and keeps them while another rank pulls again
                pulled = pull(context, built, model, pulled.initial)


def _again(context: Context, decision: Decision) -> bool:
    """Whether another pull may succeed. The same at all ranks."""
    failed = any(report.outcome == "failed" for report in decision.reports)
    return context.leased and failed and not any(report.final for report in decision.reports)


def _useless(pulled: Pulled) -> frozenset[str]:
    return frozenset() if pulled.left is None else useless_after(pulled.left)


def _why_storage(context: Context, built: Built, useless: frozenset[str], over: str) -> str:
    if context.registry is None:
        return "there is no DISCOVERY"
    left = min(context.config.wait, context.config.timeout) - context.seconds
    return loads_from_storage(
        context.registry,
        context.server,
        built.identity,
        lambda: False,
        role=context.role,
        rank=context.rank,
        wait=max(0.0, left),
        useless=useless,
        over=over or ("" if left > 0 else f"WAIT ({context.config.wait:g} s) or TIMEOUT is over"),
    )
