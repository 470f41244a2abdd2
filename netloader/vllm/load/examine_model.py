"""Second step of a load: examine the model that vLLM has built, before it has weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec

from netloader.core.identity import ModelIdentity
from netloader.vllm.load.file_reads import Traced
from netloader.vllm.load.inspect_engine import Context, why_not_comparable
from netloader.vllm.model.expert_maps import expert_maps
from netloader.vllm.model.identity import fingerprint_of_model
from netloader.vllm.model.load_state import load_state_of
from netloader.vllm.model.snapshot import named_raw_tensors
from netloader.vllm.model.support import why_not
from netloader.vllm.serve.guard import error_text, serving_only
from netloader.vllm.serve.recording import Before
from netloader.vllm.serve.retention import named

if TYPE_CHECKING:
    import torch

__all__ = ["Built", "examine"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """A model that has no weights yet.

    Attributes:
        tensors: The raw tensors to fill, by name.
        load_state: Facts that loading may change (see :mod:`netloader.vllm.model.load_state`).
        before: Everything else that loading may change; None if it could not be recorded.
        unsupported: Why the model can be neither pulled nor served; empty when it can.
        identity: What must match at a source; None for a model that is not supported.
        fingerprint: Fingerprint of the checkpoint's files on this host; empty when there are none.
        traced: Which weights hold the tensors that the constructor read from files.
    """

    tensors: Mapping[str, torch.Tensor]
    load_state: Mapping[str, bool]
    before: Before | None
    unsupported: str = ""
    identity: ModelIdentity | None = None
    fingerprint: str = ""
    traced: Traced = field(default_factory=Traced)


def examine(context: Context, model: torch.nn.Module) -> Built:
    """Examine a model that vLLM has just built.

    If the examination fails, the model counts as not supported and is loaded by default, because nothing shows that it
    equals the model of a source. The error is logged and not raised, because the other ranks wait for this one.
    """
    before: Before | None = None
    with serving_only("noting what the model has beside its weights", None):
        before = Before.of(model)
    built = Built({}, load_state_of(model), before)
    try:
        fingerprint = fingerprint_of_model(context.engine.model_config)
        tensors = named_raw_tensors(model)
        built = replace(built, tensors=tensors, fingerprint=fingerprint, traced=context.reads.traced(tensors))
        unsupported = _why_not(context, built)
        if unsupported:
            return replace(built, unsupported=unsupported)
        if context.probed is None:  # the reason was logged
            return replace(built, unsupported="looking at the model failed: its identity could not be determined")
        identity = context.probed.identity
        unknown = why_not_comparable(identity, context.settings)
        if unknown:
            return replace(built, unsupported=unknown)
        placement = ", ".join(text for text in (context.topology.experts, expert_maps(model)) if text)
        identity = msgspec.structs.replace(identity, fingerprint=fingerprint, expert_placement=placement)
        return replace(built, identity=identity)
    except Exception as error:
        log.exception("netloader: rank %d: looking at the model failed: nothing is pulled or served", context.rank)
        return replace(built, unsupported=f"looking at the model failed: {error_text(error)}")


def _why_not(context: Context, built: Built) -> str:
    """Why these raw tensors can be neither pulled nor served, or are not the whole model; empty when they can."""
    if built.traced.lost:
        return (
            "the model reads tensors from files while it is built, and not all of them are weights that have a name: "
            f"{named(built.traced.lost)}"
        )
    return why_not(context.engine.vllm_config, built.tensors, context.engine.model_config)
