"""Third step of a load: pull the weights, raw ones or else processed ones, or say why that was not possible."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import msgspec

from netloader.core.identity import ModelIdentity, is_digest
from netloader.core.report import PullReport
from netloader.errors import MemoryStillInUse, NetloaderError, RemoteProtocolError, shown
from netloader.vllm.load.examine_model import Built
from netloader.vllm.load.inspect_engine import Context
from netloader.vllm.load.processed_pull import Adopted, adopt_processed, check_possible
from netloader.vllm.load.pulling import only_processed, pull_raw
from netloader.vllm.model.agreement import Report
from netloader.vllm.model.expert_maps import expert_maps
from netloader.vllm.model.initial_values import InitialValues

if TYPE_CHECKING:
    import torch

__all__ = ["Pulled", "pull"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pulled:
    """How the pull of this rank went.

    Attributes:
        told: What the other ranks are told.
        report: The account of the pull; None when nothing was pulled.
        initial: Puts back what a pull that failed has overwritten; None when nothing was written.
        adopted: What to compare the finished model with; None unless the weights are processed ones.
        rebuild: Whether the model was post-processed for processed weights, so that only a model that is built anew can
            be loaded by default.
        memory_in_use: The error where a thread may still write into the weights. Nothing else may fill them.
    """

    told: Report
    report: PullReport | None = None
    initial: InitialValues | None = None
    adopted: Adopted | None = None
    rebuild: bool = False
    memory_in_use: MemoryStillInUse | None = None

    @property
    def parents(self) -> tuple[str, ...]:
        """Addresses that some of the weights came from."""
        shares = {} if self.report is None else self.report.sources
        return tuple(source for source, share in shares.items() if share.blocks)


def pull(context: Context, built: Built, model: torch.nn.Module) -> Pulled:
    """Pull, where there is something to pull from.

    Errors are part of the result, because the other ranks wait for this one's report.
    """
    rank, serves = context.rank, context.server is not None
    why = context.config.why_no_source(rank) or built.unsupported
    identity = built.identity
    if why or identity is None:
        # Where the default loader is forbidden, having no way to pull is a failure that the others must hear of.
        outcome: Literal["default", "failed"] = "default" if context.config.fallback else "failed"
        return Pulled(Report(outcome, rank, fingerprint=built.fingerprint, reason=why, serves=serves))
    failed = Pulled(Report("failed", rank, serves=serves))
    began = time.monotonic()
    try:
        without = context.left_out(built.tensors, {**built.load_state, **_stated(context)})
        wanted = {name: tensor for name, tensor in built.tensors.items() if name not in without}
        failed = replace(failed, initial=InitialValues(wanted, built.traced.filled))
        report = pull_raw(wanted, identity, context.sources, context.config, _asking(context), context.server)
        _check_source(context, built, model, report.identity, without)
    except MemoryStillInUse as error:
        return replace(_because(failed, str(error)), memory_in_use=error)
    except NetloaderError as error:
        return _pull_processed(context, identity, model, _because(failed, str(error)), began)
    except Exception as error:
        log.exception("netloader: rank %d: unexpected error while pulling", rank)
        return _because(failed, _unexpected(error))
    theirs = report.identity
    # Theirs, not that of the files here: where the source has no fingerprint, nothing was compared with these files.
    told = Report("pulled", rank, root=report.root, load=theirs.load, fingerprint=theirs.fingerprint, serves=serves)
    return replace(failed, told=told, report=report)


def _pull_processed(
    context: Context, identity: ModelIdentity, model: torch.nn.Module, failed: Pulled, began: float
) -> Pulled:
    """Pull processed weights where sources hold nothing else. `failed` is returned where that is not possible."""
    registrations, initial = context.registrations, failed.initial
    if registrations is None or initial is None:
        return failed

    def spent() -> float:
        return _asking(context) + time.monotonic() - began

    wanted = msgspec.structs.replace(identity, layout="processed")

    def pull_into(tensors: Mapping[str, torch.Tensor]) -> PullReport:
        return pull_raw(tensors, wanted, sources, context.config, spent())

    try:
        sources = only_processed(context.sources, context.role, context.config, spent())
        if not sources:
            return failed
        log.info("netloader: rank %d: %s: the source holds processed weights only", context.rank, context.role)
        initial.restore()
        check_possible()
        failed = replace(failed, rebuild=True)
        adopted = adopt_processed(model, context.engine.model_config, context.engine.device, pull_into)
        _check_digests(adopted.report.identity)
    except NetloaderError as error:
        in_use = error if isinstance(error, MemoryStillInUse) else None
        return replace(_because(failed, f"processed weights: {error}"), memory_in_use=in_use)
    except Exception as error:
        log.exception("netloader: rank %d: unexpected error while taking over processed weights", context.rank)
        return _because(failed, _unexpected(error))
    # No root: those that ranks compare are roots of raw weights.
    told = Report(
        "pulled", context.rank, fingerprint=adopted.report.identity.fingerprint, serves=context.server is not None
    )
    return replace(failed, told=told, report=adopted.report, adopted=adopted)


def _because(failed: Pulled, reason: str) -> Pulled:
    return replace(failed, told=msgspec.structs.replace(failed.told, reason=reason))


def _unexpected(error: Exception) -> str:
    return f"unexpected {type(error).__name__}: {error}"


def _stated(context: Context) -> Mapping[str, bool]:
    return {} if context.asked is None else context.asked.load_state


def _asking(context: Context) -> float:
    return 0.0 if context.asked is None else context.asked.seconds


def _check_source(
    context: Context, built: Built, model: torch.nn.Module, theirs: ModelIdentity, without: frozenset[str]
) -> None:
    """Check what a source said of itself, now that its weights are here.

    Raises:
        RemoteProtocolError: Some of it can't be true.
    """
    _check_digests(theirs)
    if expert_maps(model) != built.maps:
        raise RemoteProtocolError("the source holds other expert maps than it said", hint="pull from another source")
    if context.left_out(built.tensors, {**built.load_state, **theirs.load_state}) != without:
        raise RemoteProtocolError(
            f"the source says {theirs.load_state} of its {context.role}, which does not fit the tensors that it holds",
            hint="pull from another source",
        )


def _check_digests(theirs: ModelIdentity) -> None:
    """Check what a source calls a digest: it is passed on to other ranks and clients."""
    for field in ("load", "fingerprint"):
        if not is_digest(getattr(theirs, field)):
            raise RemoteProtocolError(
                f"the source's {field} is no digest: {shown(getattr(theirs, field))}",
                hint="use a source that runs a release of netloader",
            )
