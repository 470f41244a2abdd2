"""The one line that sums up a load: what, bytes, seconds, rate, and from whom or why not."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from netloader.vllm.load.fill_model import Filled
from netloader.vllm.load.inspect_engine import Context
from netloader.vllm.model.snapshot import named_raw_tensors
from netloader.vllm.serve.guard import serving_only

if TYPE_CHECKING:
    import torch

__all__ = ["log_summary"]

log = logging.getLogger(__name__)

_SHOWN_REASON = 600
_SHOWN_SOURCES = 8


def log_summary(context: Context, filled: Filled, model: torch.nn.Module) -> None:
    """Log the summary of a load that has ended, once, at INFO. Details of a pull follow at DEBUG. Raises nothing."""
    with serving_only("summing up the load", None):
        text, details = _pulled(filled) if filled.report is not None else _loaded(context, filled, model)
        log.info("netloader: rank %d: %s: %s", context.rank, context.role, text)
        for line in details:
            log.debug("netloader: rank %d: %s: %s", context.rank, context.role, line)


def _pulled(filled: Filled) -> tuple[str, list[str]]:
    if filled.report is None:
        return "", []
    summary, *details = filled.report.lines()
    gave = [f"{share.blocks} of {source}" for source, share in filled.report.sources.items() if share.blocks]
    more = f" and {len(gave) - _SHOWN_SOURCES} more" if len(gave) > _SHOWN_SOURCES else ""
    blocks = f"; blocks: {', '.join(gave[:_SHOWN_SOURCES])}{more}"
    fingerprint = f"; checkpoint fingerprint {filled.fingerprint}" if filled.fingerprint else ""
    return f"{summary}{blocks}; root {filled.report.root}{fingerprint}", details


def _loaded(context: Context, filled: Filled, model: torch.nn.Module) -> tuple[str, list[str]]:
    storages = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in named_raw_tensors(model).values()}
    megabytes = sum(storages.values()) / 1e6
    rate = f" ({megabytes / filled.seconds:.0f} MB/s)" if filled.seconds > 0 else ""
    reason = filled.reason if len(filled.reason) <= _SHOWN_REASON else f"{filled.reason[:_SHOWN_REASON]}..."
    why = f"; not pulled: {reason}" if reason else ""
    how = context.config.fallback_format
    return f"loaded {megabytes:.1f} MB from storage ({how}) in {filled.seconds:.2f} s{rate}{why}", []
