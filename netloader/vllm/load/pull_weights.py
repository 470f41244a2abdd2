"""Third step of a load: pull raw weights, or else processed ones, or return the reason why that was not possible."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import msgspec

from netloader.core.identity import ModelIdentity
from netloader.core.report import PullReport
from netloader.errors import MemoryStillInUse, NetloaderError, NoSourceLeft, RemoteProtocolError, unexpected
from netloader.vllm.load.examine_model import Built
from netloader.vllm.load.inspect_engine import Context
from netloader.vllm.load.processed_pull import Adopted, adopt_processed, check_supported
from netloader.vllm.load.pulling import check_digests, only_processed, pull_raw
from netloader.vllm.load.relaying import withdraw
from netloader.vllm.model.agreement import Report
from netloader.vllm.model.computed_values import ComputedValues
from netloader.vllm.model.initial_values import InitialValues

if TYPE_CHECKING:
    import torch

__all__ = ["Pulled", "pull"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pulled:
    """How the pull of this rank went.

    Attributes:
        own_report: What this rank reports to the other ranks.
        report: The report of the pull; None when nothing was pulled.
        initial: Restores the values that a failed pull has overwritten; None when nothing was written.
        adopted: What to compare the finished model with; None unless the weights are processed.
        computed: Restores what no checkpoint fills; None unless the weights are processed.
        rebuild: Whether the model was post-processed to receive processed weights. The default loader can fill it only
            after it was built again.
        memory_in_use: The error if a thread may still write into the weights. Nothing else may fill them.
        left: The error if no source was left for raw weights; it says which sources were of no use.
    """

    own_report: Report
    report: PullReport | None = None
    initial: InitialValues | None = None
    adopted: Adopted | None = None
    computed: ComputedValues | None = None
    rebuild: bool = False
    memory_in_use: MemoryStillInUse | None = None
    left: NoSourceLeft | None = None

    @property
    def parents(self) -> tuple[str, ...]:
        """Addresses of the sources that sent blocks."""
        shares = {} if self.report is None else self.report.sources
        return tuple(source for source, share in shares.items() if share.blocks)

    def restore_computed(self) -> None:
        """Put back what no checkpoint fills, because processed weights are not kept. A second call does nothing."""
        # Where a thread may still write into that memory, nothing could be put back for good: the load ends.
        if self.computed is not None and self.memory_in_use is None:
            self.computed.restore()

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Put back what no checkpoint fills if the block raises: the process, and another model in it, may go on."""
        try:
            yield
        except BaseException:
            self.restore_computed()
            raise


def pull(context: Context, built: Built, model: torch.nn.Module, initial: InitialValues | None = None) -> Pulled:
    """Pull the weights if there is a source.

    Errors are part of the result, because the other ranks wait for the report of this one.

    Args:
        context: What was known before the model was built.
        built: The model without weights.
        model: The same model.
        initial: The values before an earlier pull; None for the first one.
    """
    rank, serves = context.rank, context.server is not None
    why = context.why_no_source or built.unsupported
    identity = built.identity
    if why or identity is None:
        # If FALLBACK forbids the default loader, this rank gets no weights, and must report a failure.
        outcome: Literal["default", "failed"] = "default" if context.config.fallback else "failed"
        return Pulled(Report(outcome, rank, fingerprint=built.fingerprint, reason=why, serves=serves))
    failed = Pulled(Report("failed", rank, serves=serves))
    began = time.monotonic()
    try:
        without = context.left_out(built.tensors, {**built.load_state, **_stated(context)})
        wanted = {name: tensor for name, tensor in built.tensors.items() if name not in without}
        failed = replace(failed, initial=initial or InitialValues(wanted, built.traced.filled))
        given, config = context.config.sources_for(rank), context.config
        report = pull_raw(
            wanted, identity, given, config, context.seconds, context.server, context.registry, context.leased
        )
        _check_source(context, built, report.identity, without)
    except MemoryStillInUse as error:
        return replace(_because(failed, str(error)), memory_in_use=error)
    except NetloaderError as error:
        failed = replace(_because(failed, str(error)), left=error if isinstance(error, NoSourceLeft) else None)
        return _pull_processed(context, identity, model, failed, began)
    except Exception as error:
        log.exception("netloader: rank %d: unexpected error while pulling", rank)
        return _because(failed, unexpected(error).message)
    theirs = report.identity
    # The fingerprint is the source's. If the source has none, nothing was compared with the files of this host.
    own_report = Report(
        "pulled", rank, root=report.root, load=theirs.load, fingerprint=theirs.fingerprint, serves=serves
    )
    return replace(failed, own_report=own_report, report=report)


def _pull_processed(
    context: Context, identity: ModelIdentity, model: torch.nn.Module, failed: Pulled, began: float
) -> Pulled:
    """Pull processed weights from sources that hold no raw ones.

    Args:
        context: What was known before the model was built.
        identity: The identity of the raw weights.
        model: The model.
        failed: How the pull of raw weights failed. It is returned if processed weights can't be pulled either.
        began: When the pull of raw weights began, on the monotonic clock.
    """
    registrations, initial = context.registrations, failed.initial
    if registrations is None or initial is None:
        return failed

    def spent() -> float:
        return context.seconds + time.monotonic() - began

    wanted = msgspec.structs.replace(identity, layout="processed")

    def pull_into(tensors: Mapping[str, torch.Tensor]) -> PullReport:
        return pull_raw(tensors, wanted, sources, context.config, spent(), leased=context.leased)

    try:
        sources = only_processed(context.sources, context.role, context.config, spent())
        if not sources:
            return failed
        log.info("netloader: rank %d: %s: the source holds processed weights only", context.rank, context.role)
        # The raw weights may have been pulled completely, and refused afterwards: they are still passed on then.
        withdraw(context, (), "its owner restores the initial values")
        initial.restore()
        rules = check_supported(model)
        final = msgspec.structs.replace(failed.own_report, final=True)  # only the default loader can fill it now
        failed = replace(failed, own_report=final, rebuild=True, computed=ComputedValues(model))
        adopted = adopt_processed(model, context.engine.model_config, context.engine.device, rules, pull_into)
        check_digests(adopted.report.identity)
    except NetloaderError as error:
        in_use = error if isinstance(error, MemoryStillInUse) else None
        return replace(_because(failed, f"processed weights: {error}"), memory_in_use=in_use)
    except Exception as error:
        log.exception("netloader: rank %d: unexpected error while taking over processed weights", context.rank)
        return _because(failed, unexpected(error).message)
    # Without a root, because ranks compare roots of raw weights only.
    own_report = Report(
        "pulled", context.rank, fingerprint=adopted.report.identity.fingerprint, serves=context.server is not None
    )
    return replace(failed, own_report=own_report, report=adopted.report, adopted=adopted)


def _because(failed: Pulled, reason: str) -> Pulled:
    return replace(failed, own_report=msgspec.structs.replace(failed.own_report, reason=reason))


def _stated(context: Context) -> Mapping[str, bool]:
    return {} if context.probed is None else context.probed.load_state


def _check_source(context: Context, built: Built, theirs: ModelIdentity, without: frozenset[str]) -> None:
    """Check the statements of a source against the weights that it sent.

    Raises:
        RemoteProtocolError: A statement can't be true.
    """
    check_digests(theirs)
    if context.left_out(built.tensors, {**built.load_state, **theirs.load_state}) != without:
        raise RemoteProtocolError(
            f"the source says {theirs.load_state} of its {context.role}, which does not fit the tensors that it holds",
            hint="pull from another source",
        )
