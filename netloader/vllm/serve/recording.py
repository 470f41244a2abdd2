"""Record a model's raw tensors when loading ends, while they are still raw: for the other ranks, and for serving.

An error here must not end a load, and every rank has to reach the exchange that follows. So after an error, the record
has a reason, no root, and nothing to serve.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from netloader.config import Config
from netloader.core.identity import ModelIdentity, Role
from netloader.errors import NetloaderError
from netloader.vllm.model.overwritten import overwritten_modules
from netloader.vllm.model.plain_state import PlainState
from netloader.vllm.model.snapshot import RawWeights, UnnamedTensors, named_raw_tensors
from netloader.vllm.serve.guard import HINT, error_text
from netloader.vllm.serve.retention import copy_log_lines, keep_policy, named, quantised_modules

if TYPE_CHECKING:
    import torch

    from netloader.core.protocol.events import Announcement

__all__ = ["Before", "Record", "Recorded", "Snapshot", "record"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Before:
    """What a model has beside its weights, before they are loaded.

    Attributes:
        state: Plain facts.
        unnamed: Tensors that have no name.
        names: The names of its raw tensors.
    """

    state: PlainState
    unnamed: UnnamedTensors
    names: tuple[str, ...]

    @classmethod
    def of(cls, model: torch.nn.Module) -> Before:
        """Record the model as it is now."""
        return cls(PlainState(model), UnnamedTensors(model), tuple(named_raw_tensors(model)))

    def why_not_raw(self, model: torch.nn.Module) -> tuple[str, str]:
        """Why the raw tensors are not all that loading changed, and a hint; empty when they are."""
        changed = [name for part in (self.state, self.unnamed) for name in part.changed_by_loading(model)]
        if changed:
            return f"loading sets more than tensors: {named(changed)}", "load this model from storage"
        if self.names != tuple(named_raw_tensors(model)):
            return "loading changes which tensors the model has", "load this model from storage"
        return "", ""


@dataclass(frozen=True)
class Recorded:
    """The raw tensors as they were when loading ended.

    Attributes:
        raw: What is kept of them.
        announcement: Their announcement.
        device: Their device, as torch names it.
        quantised: Names of the modules whose weights are quantised.
    """

    raw: RawWeights
    announcement: Announcement
    device: str
    quantised: frozenset[str]


@dataclass(frozen=True)
class Record:
    """The raw tensors of a model when loading ends, or why they can't be served.

    Attributes:
        announcement: Their manifest and digests; None if loading changed more than raw tensors, or after an error.
        recorded: What may be served of them later; None if nothing may, or if there is no server.
        refusal: Why raw tensors can't be served, and a hint; empty when they can.
    """

    announcement: Announcement | None = None
    recorded: Recorded | None = None
    refusal: tuple[str, str] = ("", "")

    @property
    def root(self) -> str:
        """Root of the raw tensors; empty when it is not known."""
        return "" if self.announcement is None else self.announcement.root

    def refused(self, what: str, error: Exception) -> Record:
        """The same record with nothing to serve, because of `error`, which is logged here."""
        log.error("netloader: %s failed, which costs what is served and nothing else", what, exc_info=error)
        return replace(self, recorded=None, refusal=(f"{what} failed: {error_text(error)}", HINT))


@dataclass(frozen=True)
class Snapshot:
    """What is known of a model when loading ends. It decides which layouts can be served.

    Attributes:
        role: Whether it is the target or its draft.
        record: The record of its raw tensors.
        load: Digest over the roots of all ranks; empty when a root is not known.
        identity: The identity of the model; None for a model that is not supported.
        processed: Whether processed weights were pulled.
        shares: Whether it is a draft that uses tensors of its target.
    """

    role: Role
    record: Record
    load: str = ""
    identity: ModelIdentity | None = None
    processed: bool = False
    shares: bool = False

    @property
    def root(self) -> str:
        """Root of the raw tensors; empty when it is not known."""
        return self.record.root


def record(
    model: torch.nn.Module,
    before: Before,
    identity: Callable[[], ModelIdentity],
    left_out: Callable[[Mapping[str, torch.Tensor]], Collection[str]],
    config: Config,
    who: str,
    *,
    pulled: Announcement | None,
    serves: bool,
) -> Record:
    """Record digests of the raw tensors while they are still raw, in ranks with and without a server. Raises nothing.

    Args:
        model: The model, loaded and not yet post-processed.
        before: What it had beside its weights before it was loaded.
        identity: Returns the identity of the model.
        left_out: Returns the names of the tensors that are not served.
        config: netloader's configuration.
        who: The rank and the role, for the log.
        pulled: The announcement of the weights that were pulled; None if nothing was. These are not hashed again.
        serves: Whether there is a server.
    """
    found = Record()
    try:
        refusal = before.why_not_raw(model)
        if refusal[0]:
            return Record(refusal=refusal)
        tensors = named_raw_tensors(model)
        without = frozenset(left_out(tensors))
        offered = {name: tensor for name, tensor in tensors.items() if name not in without}
        found = _held(offered, identity(), pulled)
        if serves and found.announcement is not None:
            found = replace(found, recorded=_recorded(model, found.announcement, config, who))
    except Exception as error:  # noqa: BLE001 - logged by `refused`, with its traceback
        return found.refused("recording the weights", error)
    return found


def _held(tensors: Mapping[str, torch.Tensor], identity: ModelIdentity, pulled: Announcement | None) -> Record:
    from netloader.tensors import describe, hold

    try:
        if pulled is not None and describe(tensors)[0] == pulled.manifest:
            # The pull has verified every block. `RawWeights.locate` hashes them again after post-processing.
            return Record(replace(pulled, identity=identity))
        # The holding itself is not kept, because it would keep tensors alive that vLLM is about to replace.
        return Record(hold(tensors, identity).announcement)
    except NetloaderError as error:
        return Record(refusal=(str(error), "load this model from storage"))


def _recorded(model: torch.nn.Module, announcement: Announcement, config: Config, who: str) -> Recorded:
    quantised = quantised_modules(model)
    overwritten = overwritten_modules(model) if config.keep_raw else frozenset[str]()
    raw = RawWeights(model, announcement, keep_policy(quantised, config, overwritten))
    for level, line in copy_log_lines(raw.copies):
        log.log(level, "netloader: %s: %s", who, line)
    return Recorded(raw, announcement, raw.device, quantised)
