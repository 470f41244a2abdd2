"""One load of one model in one worker: pull or fall back, agree with the other ranks, then serve."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from netloader.config import Config
from netloader.core.identity import ModelIdentity, is_digest
from netloader.core.report import PullReport
from netloader.errors import MemoryStillInUse, NetloaderError, RemoteProtocolError, shown
from netloader.vllm.load.drafts import left_out, named_like_target, shares_with_target
from netloader.vllm.load.file_reads import FileReads, Traced
from netloader.vllm.load.processed_pull import ProcessedPull
from netloader.vllm.load.pulling import ask_sources, check_transports, only_processed, pull_raw
from netloader.vllm.load.tied_embeddings import adopt_untied, could_adopt, tied_by_files
from netloader.vllm.model.agreement import (
    Report,
    disagreement,
    exchange,
    groups_of_this_engine,
    load_digest,
    mixture,
    roots_wanted,
)
from netloader.vllm.model.expert_maps import expert_maps
from netloader.vllm.model.fallback import fallback_loader
from netloader.vllm.model.identity import fingerprint_of_model, identity_of, role_of
from netloader.vllm.model.initial_values import InitialValues
from netloader.vllm.model.load_state import apply_load_state, load_state_of
from netloader.vllm.model.quantisation import why_unknown
from netloader.vllm.model.snapshot import named_raw_tensors
from netloader.vllm.model.support import why_not
from netloader.vllm.model.topology import topology_of
from netloader.vllm.serve.choose_layout import Settling
from netloader.vllm.serve.guard import HINT, described, refuse, serving_only
from netloader.vllm.serve.recording import Before, Record, record
from netloader.vllm.serve.retention import named
from netloader.vllm.serve.serving import WorkerServer, worker_server

if TYPE_CHECKING:
    import torch

    from netloader.core.protocol.events import Announcement

__all__ = ["Load", "NothingPulled"]

log = logging.getLogger(__name__)

_SLACK = 60.0
_LOAD_LIMIT = 7200.0
"""Seconds that the ranks of one engine may end their loads apart: one may read slow storage while another one pulled,
and nothing tells how long that takes. It bounds a rank that hangs. One that dies ends the wait at once: the connections
of the group break."""


class NothingPulled(NetloaderError):
    """No weights could be pulled, and FALLBACK forbids the default loader."""


class Load:
    """One load.

    Args:
        vllm_config: vLLM's configuration for this model.
        model_config: The part of it that describes the model.
        load_config: How vLLM was told to load.
        config: Ours.

    Attributes:
        building: What vLLM has to build the model in: it notes what the model reads from files by itself.
    """

    def __init__(self, vllm_config: Any, model_config: Any, load_config: Any, config: Config) -> None:
        self._vllm_config = vllm_config
        self._model_config = model_config
        self._load_config = load_config
        self._config = config
        self._role = role_of(model_config)
        self._topology = topology_of(vllm_config, model_config)
        self._rank = self._topology.rank
        self._sources = config.sources_for(self._rank)
        self._server: WorkerServer | None = None
        self._report: PullReport | None = None
        self._record = Record()
        self.building = FileReads()
        self._traced = Traced()
        self._load = self._fingerprint = self._maps = ""
        self._asked = 0.0
        self._shares = shares_with_target(vllm_config, self._role)
        self._built: dict[str, bool] = {}
        self._stated: dict[str, bool] = {}
        self._processed: ProcessedPull | None = None
        self._memory_in_use: MemoryStillInUse | None = None

    @cached_property
    def _fallback(self) -> Any:
        return fallback_loader(self._load_config, self._config.fallback_format, self._config.fallback_config)

    @cached_property
    def _identity(self) -> ModelIdentity:
        tied = tied_by_files(self._model_config)
        named = named_like_target(self._vllm_config, self._model_config, self._role)
        return identity_of(
            self._model_config,
            self._topology,
            name=self._config.model if named else None,
            tied=tied,
            cache_config=getattr(self._vllm_config, "cache_config", None),
            load_config=self._load_config,
        )

    @property
    def announcement(self) -> Announcement | None:
        """What the raw tensors were when loading ended; None when raw tensors alone do not make this model."""
        return self._record.announcement

    @property
    def device(self) -> str:
        """Where the model is built, as torch names it."""
        wanted = self._load_config.device
        return str(self._vllm_config.device_config.device if wanted is None else wanted)

    @property
    def is_last(self) -> bool:
        """Whether this worker loads no other model after it."""
        return not (self._role == "target" and _has_draft(self._vllm_config))

    @property
    def post_processing(self) -> AbstractContextManager[object]:
        """What vLLM's post-processing of the model has to run in."""
        return nullcontext() if self._processed is None else self._processed.context

    # --- before the model is built ----------------------------------------------------------------------------------

    def prepare(self, prefix: str = "") -> None:
        """Check the configuration, open the server, and learn from the sources what decides how the model is built.

        Args:
            prefix: Under which vLLM builds the model.

        Raises:
            ConfigError: The configuration can't work with this vLLM.
            NothingPulled: There is nothing to pull from, and FALLBACK forbids the default loader.
        """
        for override in self._config.overrides:
            log.info("netloader: %s", override)
        for warning in self._config.warnings:
            log.warning("netloader: %s", warning)
        check_transports(self._config)
        self._processed = ProcessedPull(self._vllm_config, self._model_config, self.device, prefix)
        if self._config.fallback:
            _ = self._fallback  # its errors belong here, also when it is not needed in the end
        elif not self._sources:
            raise NothingPulled(
                f"rank {self._rank} has nothing to pull from ({self._config.why_no_source(self._rank)}), "
                "and FALLBACK is false",
                hint="give it a SOURCE, or leave FALLBACK out",
            )
        self._open_server()
        if self._sources and (self._could_adopt() or self._shares):
            self._adopt()

    def _open_server(self) -> None:
        with serving_only("starting the server", None):
            self._server = worker_server(self._config, self._rank, self.device)
        server = self._server
        if server is not None:
            with serving_only("announcing what is being loaded", server):
                server.expect(self._role, "the model is still being loaded")
                if not self.is_last:
                    server.expect("draft", "the draft model is loaded after its target")

    def _could_adopt(self) -> bool:
        return self._identity.tied is None and could_adopt(self._model_config)

    def _adopt(self) -> None:
        began = time.monotonic()
        source = ask_sources(self._sources, self._role, self._config)
        self._asked = time.monotonic() - began
        if source is None:
            return
        # Which tensors of such a draft its checkpoint fills is known to who read it, and decides what is pulled.
        self._stated = source.load_state
        if self._could_adopt() and adopt_untied(self._model_config, source):
            self._identity = msgspec.structs.replace(self._identity, tied=False)
            log.info(
                "netloader: rank %d: config.json says that the embeddings are tied, the source's weight files have an "
                "output embedding of its own; the %s is built as the source's is",
                self._rank,
                self._role,
            )

    # --- load_weights -----------------------------------------------------------------------------------------------

    def fill(self, model: torch.nn.Module) -> None:
        """Give the model its weights: what `load_weights` has to do.

        Raises:
            NothingPulled: Nothing could be pulled, and FALLBACK forbids the default loader.
            AgreementError, MemoryStillInUse: Another rank ended meanwhile; a thread may still write into the weights.
        """
        self.building.stop()
        grace = 0.0
        try:
            self._fill(model)
            grace = self._config.relay_grace
        finally:
            # vLLM may change any tensor from here on.
            self._withdraw("its owner prepares the weights for use", grace)

    def _withdraw(self, reason: str, grace: float = 0.0) -> None:
        """Have nobody read what was pulled; clients in the middle are told where it came from."""
        if self._server is not None:
            shares = {} if self._report is None else self._report.sources
            parents = [source for source, share in shares.items() if share.blocks]
            with serving_only("passing on what was pulled", self._server, [self._role]):
                self._server.withdraw(self._role, reason, grace=grace, sources=parents)

    def _fill(self, model: torch.nn.Module) -> None:
        tensors = named_raw_tensors(model)
        self._built = load_state_of(model)
        before: Before | None = None
        with serving_only("noting what the model has beside its weights", None):
            before = Before.of(model)
        unsupported = self._look(model, tensors)
        fresh, mine = self._pull(model, tensors, unsupported)
        reports = exchange(mine, self._groups(), self._config.timeout + _SLACK)
        if self._memory_in_use is not None:  # said only now, so that the other ranks know
            raise self._memory_in_use
        why_not_kept = disagreement(reports)
        if mine.outcome == "pulled" and not why_not_kept:
            self._take_over(model)
        else:
            self._load_by_default(model, mine, why_not_kept, fresh)
        if not roots_wanted(reports):
            return
        self._record = self._recorded(model, before, unsupported)
        kept = not why_not_kept and any(report.outcome == "pulled" for report in reports)
        mine = msgspec.structs.replace(mine, outcome=mine.outcome if kept else "default")
        reports = self._swap_roots(mine)
        why_not_kept = mixture(reports)
        if why_not_kept:
            # All ranks see the same reports, so all of them come here.
            if mine.outcome == "pulled":
                self._load_by_default(model, mine, why_not_kept, fresh)
                self._record = self._recorded(model, before, unsupported)
            reports = self._swap_roots(msgspec.structs.replace(mine, outcome="default"))
        self._load = load_digest(report.root for report in reports)

    def _look(self, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> str:
        """What the model is before it has weights, and why it can neither be pulled nor served; empty when it can.

        Raises nothing: the other ranks wait for this one. Of what could not be looked at, nothing is known to be equal.
        """
        try:
            self._fingerprint = fingerprint_of_model(self._model_config)
            unsupported = self._why_not(tensors)
            if not unsupported:
                self._maps = expert_maps(model)
                placement = ", ".join(text for text in (self._topology.experts, self._maps) if text)
                self._identity = msgspec.structs.replace(self._identity, expert_placement=placement)
        except Exception as error:
            log.exception("netloader: rank %d: looking at the model failed: nothing is pulled or served", self._rank)
            return f"looking at the model failed: {described(error)}"
        return unsupported

    def _why_not(self, tensors: Mapping[str, torch.Tensor]) -> str:
        """Why these raw tensors can neither be pulled nor served, or would not be all of the model."""
        self._traced = self.building.traced(tensors)
        if not self._traced.lost:
            return why_not(self._vllm_config, tensors, self._model_config) or why_unknown(self._identity)
        return (
            "the model reads tensors from files while it is built, and not all of them are weights that have a name: "
            f"{named(self._traced.lost)}"
        )

    def _swap_roots(self, mine: Report) -> tuple[Report, ...]:
        mine = msgspec.structs.replace(mine, root=self._record.root, fingerprint=self._fingerprint, reason="")
        return exchange(mine, self._groups(), _LOAD_LIMIT)

    def _groups(self) -> list[tuple[Any, int, int]]:
        # A draft model is loaded by the ranks of the last pipeline stage only.
        return groups_of_this_engine(pipeline=self._role == "target")

    def _left_out(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, bool]) -> frozenset[str]:
        return left_out(tensors, state, pp_size=self._topology.pp_size) if self._shares else frozenset()

    def _pull(
        self, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], unsupported: str
    ) -> tuple[InitialValues | None, Report]:
        """Pull if there is something to pull from; never raises what another rank would have to wait for."""
        why = self._config.why_no_source(self._rank) or unsupported
        serves = self._server is not None
        files = self._fingerprint
        if why:
            # Where the default loader is forbidden, having no way to pull is a failure that the others must hear of.
            outcome: Literal["default", "failed"] = "default" if self._config.fallback else "failed"
            return None, Report(outcome, self._rank, fingerprint=files, reason=why, serves=serves)
        fresh, began = None, time.monotonic()
        try:
            without = self._left_out(tensors, {**self._built, **self._stated})
            wanted = {name: tensor for name, tensor in tensors.items() if name not in without}
            fresh = InitialValues(wanted, self._traced.filled)
            identity = msgspec.structs.replace(self._identity, fingerprint=files)
            report = pull_raw(wanted, identity, self._sources, self._config, self._asked, self._server)
            theirs = report.identity
            _check_digests(theirs)
            if expert_maps(model) != self._maps:
                raise RemoteProtocolError(
                    "the source holds other expert maps than it said", hint="pull from another source"
                )
            if self._left_out(tensors, {**self._built, **theirs.load_state}) != without:
                raise RemoteProtocolError(
                    f"the source says {theirs.load_state} of its {self._role}, "
                    "which does not fit the tensors that it holds",
                    hint="pull from another source",
                )
        except NetloaderError as error:
            self._memory_in_use = error if isinstance(error, MemoryStillInUse) else None
            return fresh, self._pull_processed(model, fresh, began, error)
        except Exception as error:
            log.exception("netloader: rank %d: unexpected error while pulling", self._rank)
            reason = f"unexpected {type(error).__name__}: {error}"
            return fresh, Report("failed", self._rank, reason=reason, serves=serves)
        self._report = report
        known = theirs.fingerprint  # not that of the files here: nobody compared them, where the source has none
        return fresh, Report("pulled", self._rank, root=report.root, load=theirs.load, fingerprint=known, serves=serves)

    def _pull_processed(
        self, model: torch.nn.Module, fresh: InitialValues | None, began: float, why_not_raw: NetloaderError
    ) -> Report:
        """No raw weights could be pulled: take processed ones, where sources hold nothing else."""
        failed = Report("failed", self._rank, reason=str(why_not_raw), serves=self._server is not None)
        processed = self._processed
        if processed is None or fresh is None or self._memory_in_use is not None:
            return failed
        sources = only_processed(self._sources, self._role, self._config, self._asked + time.monotonic() - began)
        if not sources:
            return failed
        log.info("netloader: rank %d: %s: the source holds processed weights only", self._rank, self._role)
        identity = msgspec.structs.replace(self._identity, fingerprint=self._fingerprint, layout="processed")

        def pull(into: Mapping[str, torch.Tensor]) -> PullReport:
            return pull_raw(into, identity, sources, self._config, self._asked + time.monotonic() - began)

        fresh.restore()
        try:
            report = processed.run(model, pull)
            _check_digests(report.identity)
        except NetloaderError as error:
            self._memory_in_use = error if isinstance(error, MemoryStillInUse) else None
            return msgspec.structs.replace(failed, reason=f"processed weights: {error}")
        except Exception as error:
            log.exception("netloader: rank %d: unexpected error while taking over processed weights", self._rank)
            return msgspec.structs.replace(failed, reason=f"unexpected {type(error).__name__}: {error}")
        self._report = report
        # No root: those that ranks compare are roots of raw weights.
        return msgspec.structs.replace(failed, outcome="pulled", reason="", fingerprint=report.identity.fingerprint)

    def _take_over(self, model: torch.nn.Module) -> None:
        report = self._report
        if report is None:
            raise NothingPulled("there is no report of a pull that succeeded", hint="this is a bug of netloader")
        apply_load_state(model, report.identity.load_state)
        if self._identity.tied is None:
            self._identity = msgspec.structs.replace(self._identity, tied=report.identity.tied)
        # What is known about the checkpoint now is what the source said, which weight files here did not contradict.
        self._fingerprint = report.identity.fingerprint
        if self._fingerprint:
            log.info("netloader: rank %d: %s: checkpoint fingerprint %s", self._rank, self._role, self._fingerprint)
        for line in report.lines():
            log.info("netloader: rank %d: %s: %s", self._rank, self._role, line)

    def _load_by_default(
        self, model: torch.nn.Module, mine: Report, why_not_kept: str, fresh: InitialValues | None
    ) -> None:
        if mine.outcome == "pulled":
            reason = f"what was pulled is not kept: {why_not_kept}"
        elif mine.outcome == "failed":
            reason = f"could not pull: {mine.reason}"
        else:
            reason = mine.reason
        if not self._config.fallback:
            raise NothingPulled(
                f"rank {self._rank} has no weights for its {self._role}, and FALLBACK is false: {reason}",
                hint="leave FALLBACK out to let the default loader take over",
            )
        level = logging.INFO if mine.outcome == "default" and not self._sources else logging.WARNING
        log.log(
            level,
            "netloader: rank %d: the default loader (%s) loads the %s: %s",
            self._rank,
            self._config.fallback_format,
            self._role,
            reason,
        )
        self._withdraw("the default loader fills these weights instead")
        self._report = None
        if self._processed is not None and self._processed.undo(model):
            fresh = None
        if fresh is not None:
            fresh.restore()
        if load_state_of(model) != self._built:
            apply_load_state(model, self._built)  # what a source stated; loading only ever adds to it
        try:
            self._fallback.load_weights(model, self._model_config)
        except Exception as error:
            text = f"netloader: rank {self._rank}: the default loader failed too: {error}; it ran because: {reason}"
            log.error("%s", text)  # noqa: TRY400 - the error itself goes on to vLLM
            error.add_note(text)
            raise
        if fresh is not None:
            fresh.check_filled()
        # The files may have been fetched only now; and what a source said of its own is not ours.
        self._fingerprint = ""
        with serving_only("taking the checkpoint's fingerprint", None):
            self._fingerprint = fingerprint_of_model(self._model_config)

    # --- for the server ---------------------------------------------------------------------------------------------

    def _recorded(self, model: torch.nn.Module, before: Before | None, unsupported: str) -> Record:
        if self._adopted:
            return Record(
                refusal=("its own weights were pulled processed", "pull the processed layout, or from its source")
            )
        if before is None:
            return Record(refusal=("what the model has beside its weights could not be noted", HINT))
        if unsupported:
            hint = "pull from a server that runs without this feature"
            return Record(refusal=(unsupported, "load this model from storage" if self._traced.lost else hint))
        return record(
            model,
            before,
            lambda: self._known_identity(model),
            lambda tensors: self._left_out(tensors, load_state_of(model)),
            self._config,
            f"rank {self._rank}: {self._role}",
            pulled=None if self._report is None else self._report.announcement,
            serves=self._server is not None,
        )

    @property
    def _adopted(self) -> bool:
        return self._processed is not None and self._processed.adopted is not None

    def _known_identity(self, model: torch.nn.Module) -> ModelIdentity:
        state = load_state_of(model)
        return msgspec.structs.replace(self._identity, load_state=state, fingerprint=self._fingerprint)

    # --- after post-processing --------------------------------------------------------------------------------------

    def settle(self, model: torch.nn.Module) -> None:
        """Serve what can be served now that vLLM has made its weights ready."""
        if self._processed is not None:
            self._processed.check(model)
        with serving_only("offering the weights", self._server, [self._role]):
            self._serve(model)

    def _serve(self, model: torch.nn.Module) -> None:
        if self._server is None or not self._server.running:
            return
        settling = Settling(
            server=self._server,
            config=self._config,
            rank=self._rank,
            identity=self._known_identity(model),
            load=self._load,
            shares=self._shares,
            adopted=self._adopted,
            refusal=self._record.refusal,
        )
        settling.serve(model, self._record.recorded)

    def abandon(self, error: BaseException) -> None:
        """The load failed: tell clients that wait."""
        refuse(self._server, [self._role], f"the model could not be loaded: {error}", "pull from another source")


def _check_digests(theirs: ModelIdentity) -> None:
    """What a source calls a digest is handed on to other ranks and clients."""
    for field in ("load", "fingerprint"):
        if not is_digest(getattr(theirs, field)):
            raise RemoteProtocolError(
                f"the source's {field} is no digest: {shown(getattr(theirs, field))}",
                hint="use a source that runs a release of netloader",
            )


def _has_draft(vllm_config: Any) -> bool:
    speculative = getattr(vllm_config, "speculative_config", None)
    draft = None if speculative is None else getattr(speculative, "draft_model_config", None)
    return draft is not None and role_of(draft) == "draft"
