"""Fifth step of a load: keep the pulled weights, or have the default loader fill the model."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from netloader.core.identity import ModelIdentity, known_settings
from netloader.core.report import PullReport
from netloader.vllm.load.agree_ranks import Decision
from netloader.vllm.load.examine_model import Built
from netloader.vllm.load.inspect_engine import Context, NothingPulled
from netloader.vllm.load.processed_pull import Adopted
from netloader.vllm.load.pull_weights import Pulled
from netloader.vllm.load.relaying import withdraw
from netloader.vllm.model.identity import fingerprint_of_model
from netloader.vllm.model.load_state import apply_load_state, load_state_of
from netloader.vllm.serve.guard import serving_only

if TYPE_CHECKING:
    import torch

__all__ = ["Filled", "fill", "load_by_default"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Filled:
    """A model that has its weights. They are raw, unless processed weights were pulled.

    Attributes:
        identity: The identity of the model, with the fingerprint; None for a model that is not supported.
        fingerprint: Fingerprint of the checkpoint that the weights come from; empty when it is not known.
        report: The report of the pull; None if the default loader filled the model.
        adopted: What to compare the finished model with; None unless processed weights were pulled.
        seconds: How long the default loader took.
        reason: Why the default loader filled the model.
    """

    identity: ModelIdentity | None
    fingerprint: str
    report: PullReport | None = None
    adopted: Adopted | None = None
    seconds: float = 0.0
    reason: str = ""


def fill(context: Context, built: Built, pulled: Pulled, decision: Decision, model: torch.nn.Module) -> Filled:
    """Keep what was pulled if the ranks decided so. Otherwise have the default loader fill the model.

    Raises:
        NothingPulled: Nothing is kept, and FALLBACK forbids the default loader.
        Exception: What the default loader raises.
    """
    if decision.keeps:
        return _keep(built, pulled, model)
    return load_by_default(context, built, pulled, decision, model)


def _keep(built: Built, pulled: Pulled, model: torch.nn.Module) -> Filled:
    report = pulled.report
    if report is None or built.identity is None:
        raise NothingPulled("there is no report of a pull that succeeded", hint="this is a bug of netloader")
    theirs = report.identity
    apply_load_state(model, theirs.load_state)
    tied = theirs.tied if built.identity.tied is None else built.identity.tied
    # The fingerprint is the source's. The pull has compared it with that of the files here, if there are any.
    settings = known_settings(built.identity, theirs)
    identity = msgspec.structs.replace(built.identity, tied=tied, fingerprint=theirs.fingerprint, settings=settings)
    return Filled(identity, theirs.fingerprint, report, pulled.adopted)


def load_by_default(
    context: Context, built: Built, pulled: Pulled, decision: Decision, model: torch.nn.Module
) -> Filled:
    """Undo the changes that the pull made to the model, and have vLLM's default loader fill it.

    Raises:
        NothingPulled: FALLBACK forbids the default loader.
        NotRestored: The default loader did not fill tensors whose value before the pull is not known.
        Exception: What the default loader raises.
    """
    config, rank, role, reason = context.config, context.rank, context.role, decision.why_default
    if context.default_loader is None:
        raise NothingPulled(
            f"rank {rank} has no weights for its {role}, and FALLBACK is false: {reason}",
            hint="leave FALLBACK out to let the default loader take over",
        )
    level = logging.INFO if decision.own_report.outcome == "default" and not context.sources else logging.WARNING
    log.log(
        level,
        "netloader: rank %d: the default loader (%s) loads the %s: %s",
        rank,
        config.fallback_format,
        role,
        reason,
    )
    withdraw(context, pulled.parents, "the default loader fills these weights instead")
    restored = _undo(context, built, pulled, model)
    began = time.monotonic()
    try:
        context.default_loader.load_weights(model, context.engine.model_config)
    except Exception as error:
        text = f"netloader: rank {rank}: the default loader failed too: {error}; it ran because: {reason}"
        log.error("%s", text)  # noqa: TRY400 - the error itself goes on to vLLM
        error.add_note(text)
        raise
    if restored and pulled.initial is not None:
        pulled.initial.check_filled()
    filled = Filled(built.identity, "", seconds=time.monotonic() - began, reason=reason)
    # Taken again, because the default loader may have downloaded the files. No statement of a source is used.
    with serving_only("taking the checkpoint's fingerprint", None):
        filled = replace(filled, fingerprint=fingerprint_of_model(context.engine.model_config))
    if filled.identity is None:
        return filled
    return replace(filled, identity=msgspec.structs.replace(filled.identity, fingerprint=filled.fingerprint))


def _undo(context: Context, built: Built, pulled: Pulled, model: torch.nn.Module) -> bool:
    """Restore the model that vLLM built.

    Returns:
        Whether its tensors are still the ones that the pull filled. A model that was built again has other ones.
    """
    pulled.restore_computed()
    rebuild = pulled.rebuild and context.registrations is not None
    if rebuild and context.registrations is not None:
        context.registrations.rebuild(model)
    elif pulled.initial is not None:
        pulled.initial.restore()
    if load_state_of(model) != built.load_state:
        apply_load_state(model, built.load_state)  # facts from the source, which no loader resets
    return not rebuild
