"""The load of one model in one worker, as a sequence of steps. Each step takes values and returns one.

    context  = inspect(engine, config)          what is known before vLLM builds the model
               (vLLM builds the model and calls `load_weights`)
    built    = examine(context, model)          the model without weights
    pulled   = pull(context, built, model)      weights of a source, or why there are none
    decision = agree(context, pulled)           whether the ranks keep what they pulled (`pull_together`)
    filled   = fill(context, ..., model)        the pulled weights, or those of the default loader
    snapshot = record(context, ..., model)      digests of the raw tensors, compared by all ranks
               (vLLM post-processes the weights)
    choice   = choose_layout(snapshot, model)   what can be served exactly
               serve(server, choice)

vLLM calls the loader three times: before the build, for the weights, and at the end. Between the calls, the loader
keeps one value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from netloader.vllm.load.agree_ranks import agree_on_roots
from netloader.vllm.load.examine_model import examine
from netloader.vllm.load.fill_model import fill
from netloader.vllm.load.inspect_engine import Context
from netloader.vllm.load.processed_pull import Adopted, check_adopted, skip_transformations
from netloader.vllm.load.pull_together import pull_together
from netloader.vllm.load.record_weights import record
from netloader.vllm.load.relaying import relayed
from netloader.vllm.load.summary import log_summary
from netloader.vllm.serve.choose_layout import choose_layout
from netloader.vllm.serve.guard import serving_only
from netloader.vllm.serve.offer import serve
from netloader.vllm.serve.recording import Snapshot

if TYPE_CHECKING:
    import torch

__all__ = ["Loaded", "load_weights", "serve_loaded"]


@dataclass(frozen=True)
class Loaded:
    """A load between vLLM's `load_weights` and the end of its post-processing.

    Attributes:
        context: What was known before the model was built.
        snapshot: What is known of the model when its loading ended.
        adopted: What to compare the finished model with; None unless processed weights were pulled.
    """

    context: Context
    snapshot: Snapshot
    adopted: Adopted | None = None


def load_weights(context: Context, model: torch.nn.Module) -> Loaded:
    """Fill the model with weights, as vLLM's `load_weights` has to.

    Raises:
        NothingPulled: Nothing could be pulled, and FALLBACK forbids the default loader.
        AgreementError: Another rank ended, or did not report in time.
        MemoryStillInUse: A thread may still write into the weights, so that nothing else may fill them.
        Exception: What the default loader raises.
    """
    context.reads.stop()
    built = examine(context, model)
    pulled, decision = pull_together(context, built, model)
    with pulled.restored_on_error(), relayed(context, pulled.parents):
        filled = fill(context, built, pulled, decision, model)
        snapshot = record(context, built, filled, decision, model)
        agreed = agree_on_roots(context, decision, snapshot.root, filled.fingerprint)
        if agreed.why_not:  # the ranks hold weights of different checkpoints; every rank sees that, and comes here
            if agreed.own_report.outcome == "pulled":
                filled = fill(context, built, pulled, agreed, model)
                snapshot = record(context, built, filled, agreed, model)
            agreed = agree_on_roots(context, agreed, snapshot.root, filled.fingerprint)
    log_summary(context, filled, model)
    if filled.adopted is not None:
        skip_transformations(context.post_processing, model)
    return Loaded(context, replace(snapshot, load=agreed.load), filled.adopted)


def serve_loaded(loaded: Loaded, model: torch.nn.Module) -> None:
    """Serve what can be served exactly, after vLLM has post-processed the model.

    Raises:
        NotAdopted: Processed weights were pulled, and the model differs from them now.
    """
    if loaded.adopted is not None:
        check_adopted(model, loaded.adopted)
    context, server = loaded.context, loaded.context.server
    with serving_only("offering the weights", server, [context.role]):
        if server is not None and server.running:
            target = server.serves("target") if context.shares else None
            serve(server, context.rank, choose_layout(loaded.snapshot, model, context.config, target))
