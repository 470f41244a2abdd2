"""The one line that sums up a load: what, bytes, seconds, rate, and from whom or why not."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from netloader.core.texts import byte_text, one_line
from netloader.vllm.load.fill_model import Filled
from netloader.vllm.load.inspect_engine import Context
from netloader.vllm.model.snapshot import named_raw_tensors
from netloader.vllm.serve.guard import serving_only

if TYPE_CHECKING:
    import torch

__all__ = ["log_summary"]

log = logging.getLogger(__name__)


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
    if filled.fingerprint:
        details.append(f"checkpoint fingerprint {filled.fingerprint}")
    return f"{summary}; root {filled.report.root}", details


def _loaded(context: Context, filled: Filled, model: torch.nn.Module) -> tuple[str, list[str]]:
    storages = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in named_raw_tensors(model).values()}
    nbytes = sum(storages.values())
    rate = f" ({byte_text(nbytes / filled.seconds)}/s)" if filled.seconds > 0 else ""
    why = f"; not pulled: {one_line(filled.reason)}" if filled.reason else ""
    how = context.config.fallback_format
    return f"loaded {byte_text(nbytes)} from storage ({how}) in {filled.seconds:.2f} s{rate}{why}", []
