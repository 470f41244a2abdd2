"""Sixth step of a load: record digests of the model's tensors while they are still raw."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from netloader.vllm.load.agree_ranks import Decision
from netloader.vllm.load.examine_model import Built
from netloader.vllm.load.fill_model import Filled
from netloader.vllm.load.inspect_engine import Context
from netloader.vllm.model.load_state import load_state_of
from netloader.vllm.serve import recording
from netloader.vllm.serve.guard import HINT
from netloader.vllm.serve.recording import Record, Snapshot

if TYPE_CHECKING:
    import torch

__all__ = ["record"]


def record(context: Context, built: Built, filled: Filled, decision: Decision, model: torch.nn.Module) -> Snapshot:
    """Record root and digests of the raw tensors if a rank needs them. Raises nothing.

    Blocks that the pull has verified are not hashed again.
    """
    return Snapshot(
        context.role,
        _record(context, built, filled, model) if decision.wants_roots else Record(),
        identity=filled.identity,
        processed=filled.adopted is not None,
        shares=context.shares,
    )


def _record(context: Context, built: Built, filled: Filled, model: torch.nn.Module) -> Record:
    before, identity = built.before, filled.identity
    if filled.adopted is not None:
        return Record(
            refusal=("its own weights were pulled processed", "pull the processed layout, or from its source")
        )
    if before is None:
        return Record(refusal=("what the model has beside its weights could not be noted", HINT))
    if built.unsupported or identity is None:
        hint = "pull from a server that runs without this feature"
        return Record(refusal=(built.unsupported, "load this model from storage" if built.traced.lost else hint))
    return recording.record(
        model,
        before,
        lambda: msgspec.structs.replace(identity, load_state=load_state_of(model)),
        lambda tensors: context.left_out(tensors, load_state_of(model)),
        context.config,
        f"rank {context.rank}: {context.role}",
        pulled=None if filled.report is None else filled.report.announcement,
        serves=context.server is not None,
    )
