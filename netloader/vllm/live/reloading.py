"""Reload a live engine from a source. All weights are pulled and verified in staging memory first.

vLLM's `reload_weights` asks the loader for weights (`get_all_weights`). Then it restores the model to its state before
post-processing, layer by layer, loads the weights into it, and post-processes them again into the same memory. It
expects the names and shapes of a checkpoint. netloader has the model's own raw tensors, which are this rank's shards.
So for this one call, `load_weights` of the model is replaced by a function that copies raw tensors.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from netloader.config import Config
from netloader.core.identity import Role, known_settings
from netloader.errors import ManifestError, MemoryStillInUse, NetloaderError, unexpected
from netloader.vllm.load.pulling import check_digests, pull_raw
from netloader.vllm.model.agreement import Report, disagreement, exchange, groups_of_this_engine, load_digest
from netloader.vllm.model.copies import Keep, is_full
from netloader.vllm.model.fallback import fallback_loader
from netloader.vllm.model.registered import buffers_of, computed_names
from netloader.vllm.model.snapshot import Located, named_raw_tensors, same_bits
from netloader.vllm.model.topology import topology_of
from netloader.vllm.model.unquantised import reloads_exactly
from netloader.vllm.serve.guard import serving_only
from netloader.vllm.serve.raw_holding import raw_holding
from netloader.vllm.serve.retention import keep_policy, named, quantised_modules
from netloader.vllm.serve.serving import ROLES, WorkerServer, running_server

if TYPE_CHECKING:
    import torch

    from netloader.core.protocol.events import Announcement

__all__ = ["ReloadRefused", "abandon_reload", "finish_reload", "record_loaded", "was_loaded", "weights_for_reload"]

log = logging.getLogger(__name__)

_NOTE = "_netloader_loaded"
_RELOAD = "_netloader_reload"
_PAUSED = "_netloader_paused"
_COMPUTED = "_netloader_computed"
_IN_USE = "_netloader_in_use"

_SLACK = 60.0


class ReloadRefused(NetloaderError):
    """The weights of a live engine were not changed, because they could not be replaced exactly."""


@dataclass(frozen=True)
class _Loaded:
    """The raw tensors with which a model was loaded; kept with the model."""

    announcement: Announcement
    path: str


@dataclass(frozen=True)
class _Pulled:
    """How the pull of this rank went.

    Attributes:
        own_report: What this rank reports to the other ranks.
        staging: The new raw tensors, by name; empty when nothing was pulled.
        announcement: Their announcement; None when nothing was pulled.
    """

    own_report: Report
    staging: dict[str, torch.Tensor] = field(default_factory=dict)
    announcement: Announcement | None = None


@dataclass(frozen=True)
class _Pending:
    """A reload whose weights vLLM has not loaded yet."""

    staging: dict[str, torch.Tensor]
    announcement: Announcement
    load: str
    path: str
    config: Config
    rank: int


@dataclass(frozen=True)
class _Taken:
    """A reload whose weights vLLM has loaded, before the end of its post-processing."""

    pending: _Pending


def record_loaded(model: torch.nn.Module, announcement: Announcement | None, path: str) -> None:
    """Keep with a model what its raw tensors were; None when they are not known."""
    vars(model)[_NOTE] = None if announcement is None else _Loaded(announcement, path)


def was_loaded(model: torch.nn.Module) -> bool:
    """Whether this loader has loaded the model already, so that vLLM may have rewritten its weights."""
    return _NOTE in vars(model)


def weights_for_reload(
    vllm_config: Any, model_config: Any, load_config: Any, config: Config, model: torch.nn.Module
) -> Iterable[tuple[str, torch.Tensor]]:
    """The weights that vLLM's `reload_weights` is to load: pulled, or read by the default loader without a SOURCE.

    The live model is not changed before all ranks have all of their weights.

    Args:
        vllm_config: vLLM's configuration.
        model_config: The part of it that describes the model.
        load_config: How vLLM was told to load.
        config: netloader's configuration.
        model: The live model.

    Raises:
        ReloadRefused: The weights stay as they are; the message says why.
        AgreementError: Another rank ended, or did not report in time.
    """
    rank = topology_of(vllm_config, model_config).rank
    path = str(model_config.model)
    pulled = _pull(model, path, config, rank)
    reports = _agree(pulled.own_report, config)
    _save_computed(model)
    if not config.sources_for(rank):
        return _by_default(model_config, load_config, config, model, rank)
    if pulled.announcement is None:
        raise ReloadRefused("nothing was pulled, and no rank said so", hint="this is a bug of netloader")
    _pause(model, "the weights are being reloaded")
    load = load_digest(report.root for report in reports)
    return _handed_over(model, _Pending(pulled.staging, pulled.announcement, load, path, config, rank))


def _pull(model: torch.nn.Module, path: str, config: Config, rank: int) -> _Pulled:
    """Pull new weights into staging memory, if there is a source.

    Errors are part of the result, because the other ranks wait for the report of this one.
    """
    sources = config.sources_for(rank)
    if not sources:
        return _Pulled(Report("default", rank, reason=config.why_no_source(rank) or ""))
    loaded: _Loaded | None = vars(model).get(_NOTE)
    staging: dict[str, torch.Tensor] = {}
    try:
        reason = _why_not(model, loaded, path)
        if reason or loaded is None:
            return _Pulled(Report("failed", rank, reason=reason))
        root = loaded.announcement.root
        identity, wanted = loaded.announcement.identity, config.expect_root or root
        if wanted != root:
            identity = msgspec.structs.replace(identity, fingerprint="")  # other weights are wanted
        staging = _staging(loaded.announcement)
        log.info(
            "netloader: rank %d: reload: %.1f MB of staging memory, until the weights are in place",
            rank,
            sum(tensor.nbytes for tensor in set(staging.values())) / 1e6,
        )
        report = pull_raw(staging, identity, sources, msgspec.structs.replace(config, expect_root=wanted))
        check_digests(report.identity)
    except MemoryStillInUse as error:
        # The model keeps the staging memory, because nothing else may be put there while a thread may still write.
        vars(model).setdefault(_IN_USE, []).append(staging)
        return _Pulled(Report("failed", rank, reason=str(error)))
    except NetloaderError as error:
        return _Pulled(Report("failed", rank, reason=str(error)))
    except Exception as error:
        if is_full(error):
            return _Pulled(Report("failed", rank, reason=f"no memory for the new weights beside the old ones: {error}"))
        log.exception("netloader: rank %d: unexpected error while pulling", rank)
        return _Pulled(Report("failed", rank, reason=unexpected(error).message))
    settings = known_settings(identity, report.identity)
    identity = msgspec.structs.replace(identity, fingerprint=report.identity.fingerprint, settings=settings)
    announcement = None if report.announcement is None else replace(report.announcement, identity=identity)
    return _Pulled(Report("pulled", rank, root=report.root, load=report.identity.load), staging, announcement)


def _agree(own_report: Report, config: Config) -> tuple[Report, ...]:
    """Exchange the reports of all ranks about their pulls.

    Raises:
        ReloadRefused: No rank may change its weights.
        AgreementError: Another rank ended, or did not report in time.
    """
    rank = own_report.rank
    reports = exchange(own_report, groups_of_this_engine(pipeline=True), config.timeout + _SLACK)
    # Exchanged reports are cut to a fixed size. This rank's own report has the whole reason, with the hint at its end.
    reports = tuple(own_report if report.rank == rank else report for report in reports)
    outcomes = {report.outcome for report in reports}
    why = disagreement(reports) or ("some ranks have a SOURCE and some have none" if len(outcomes) > 1 else "")
    if why:
        log.warning("netloader: rank %d: the weights stay as they are: %s", rank, why)
        raise ReloadRefused(
            f"rank {rank}: the weights stay as they are: {why}",
            hint="reload from a source that has the weights which were loaded, or name others by EXPECT_ROOT",
        )
    return reports


def finish_reload(model: torch.nn.Module) -> None:
    """After a reload and its post-processing: serve the new weights if they can be served exactly.

    The reload has succeeded. An error here ends the serving only.
    """
    _restore_computed(model)
    reload = _end(model)
    paused: Sequence[Role] = vars(model).pop(_PAUSED, ())
    server = running_server()
    if not isinstance(reload, _Taken):
        if server is not None:
            server.forget_paused(ROLES)
        return
    pending, announcement = reload.pending, reload.pending.announcement
    record_loaded(model, announcement, pending.path)
    log.info("netloader: rank %d: reloaded, root %s", pending.rank, announcement.root)
    if server is None:
        return
    role = announcement.identity.role
    server.forget_paused([role])
    with serving_only("serving the reloaded weights", server, [role]):
        _serve(model, pending, server)
    _resume(server, [other for other in paused if other != role], "the reload of the other model is over")


def _end(model: torch.nn.Module) -> _Pending | _Taken | None:
    """Remove everything that a reload has attached to the model; returns how far it came, None for none of ours."""
    reload: _Pending | _Taken | None = vars(model).pop(_RELOAD, None)
    if isinstance(reload, _Pending):
        vars(model).pop("load_weights", None)  # it would take the weights of a later reload for raw tensors
    return reload


def _serve(model: torch.nn.Module, pending: _Pending, server: WorkerServer) -> None:
    announcement = pending.announcement
    device = str(next(iter(named_raw_tensors(model).values())).device)  # the staging memory is on the host
    located = _located(model, pending)
    if located.lost:
        server.refuse(
            announcement.identity.role,
            f"reloaded weights were rewritten and not kept: {named(located.lost)}",
            "set KEEP_RAW to true on the server",
        )
        return
    server.offer(
        raw_holding(announcement, device, located, pending.load),
        f"reloaded, {located.kept_bytes / 1e6:.1f} MB of originals kept, root {announcement.root}",
    )


def abandon_reload(model: torch.nn.Module) -> None:
    """After a reload that failed: free the staging memory, and serve again what was served if it is unchanged.

    If weights have changed or were dropped, clients are refused with the name of such a tensor.
    """
    _restore_computed(model)
    reload = _end(model)
    if reload is not None:
        pending = reload.pending if isinstance(reload, _Taken) else reload
        pending.staging.clear()  # the traceback of the error refers to it, and may be kept
    paused: Sequence[Role] = vars(model).pop(_PAUSED, ())
    server = running_server()
    if server is not None:
        _resume(server, paused, "the reload broke, and has changed nothing")


def _resume(server: WorkerServer, roles: Sequence[Role], reason: str) -> None:
    with serving_only("serving again after a reload", server, roles):
        try:
            server.resume(reason, roles)
        except ManifestError as error:
            log.warning("netloader: what was served before the reload is not served any more: %s", error)


def _save_computed(model: torch.nn.Module) -> None:
    """Save which buffers are computed and in no checkpoint, because vLLM 0.23 loses that for each layer it restores."""
    vars(model)[_COMPUTED] = [(module, frozenset(computed_names(module))) for module in model.modules()]


def _restore_computed(model: torch.nn.Module) -> None:
    for module, computed in vars(model).pop(_COMPUTED, ()):
        computed_names(module).update(computed & {name for name, _ in buffers_of(module)})


def _why_not(model: torch.nn.Module, loaded: _Loaded | None, path: str) -> str:
    """Why a reload would not be exact; empty when it would be."""
    if loaded is None:
        return "it is not known what this model's raw tensors were"
    if path != loaded.path:
        return f"a path was given ({path}), and a SOURCE is configured: it is not clear which weights are meant"
    if any(spec.alias_of for spec in loaded.announcement.manifest.tensors):
        return "the model has tied weights, which vLLM's reload takes apart"
    registered = {name for name, _ in model.named_modules(remove_duplicate=False)}
    unreached = [n for s in loaded.announcement.manifest.tensors if (n := s.name).rpartition(".")[0] not in registered]
    if unreached:
        return f"vLLM's own reload does not reach modules outside of the model's tree: {named(unreached)}"
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    other = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            if not reloads_exactly(method):
                other[name] = type(method).__name__
        elif hasattr(module, "process_weights_after_loading") and not reloads_exactly(module):
            other[name] = type(module).__name__  # the module itself derives tensors
    if other:
        some = named(f"{name} ({method})" for name, method in other.items())
        return f"vLLM's own reload does not put back exactly what a first load does for {some}"
    return ""


def _staging(announcement: Announcement) -> dict[str, torch.Tensor]:
    """Host memory for all raw tensors, because a device has no room for its weights twice."""
    from netloader.tensors import destination

    made = destination(None, device="cpu")
    made.adopt(announcement.manifest)
    return dict(made.tensors)


def _by_default(
    model_config: Any, load_config: Any, config: Config, model: torch.nn.Module, rank: int
) -> Iterable[tuple[str, torch.Tensor]]:
    loader = fallback_loader(load_config, config.fallback_format, config.fallback_config)
    weights = getattr(loader, "get_all_weights", None)
    if weights is None:
        raise ReloadRefused(
            f"rank {rank} has no SOURCE to reload from, and the loader for {config.fallback_format!r} cannot reload",
            hint="give it a SOURCE",
        )
    log.info("netloader: rank %d: reload: %s", rank, config.why_no_source(rank))
    _pause(model, "the weights are being reloaded from storage")
    vars(model)[_NOTE] = None  # the raw tensors are not known after this
    found: Iterable[tuple[str, torch.Tensor]] = weights(model_config, model)
    return found


def _pause(model: torch.nn.Module, reason: str) -> None:
    server = running_server()
    with serving_only("retracting what is served before a reload", server):
        if server is not None:
            vars(model)[_PAUSED] = server.pause(ROLES, reason)


def _handed_over(model: torch.nn.Module, pending: _Pending) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights for vLLM. `load_weights` of the model is replaced for one call, so that it takes raw tensors."""
    reference = weakref.ref(model)

    def load_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        found = reference()
        if found is None:
            raise ReloadRefused("the model is gone", hint="this is a bug of netloader")
        vars(found)[_RELOAD] = _Taken(pending)
        del found.load_weights
        return _fill_restored(found, weights)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        found = reference()
        if found is None or not isinstance(vars(found).get(_RELOAD), _Taken):
            # vLLM did not call `load_weights`. It would copy raw tensors over live ones, which are processed.
            raise ReloadRefused(
                f"rank {pending.rank}: the weights stay as they are: raw weights were pulled, and reload_weights was "
                "called for weights that are processed already",
                hint="call it with is_checkpoint_format=True, which is its default",
            )
        yield from pending.staging.items()

    vars(model)["load_weights"] = load_weights
    vars(model)[_RELOAD] = pending
    return weights()


def _fill_restored(model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Copy raw tensors into a model that vLLM has restored to its state before post-processing."""
    from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
    from vllm.model_executor.model_loader.reload.utils import get_layer_tensors
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    # The weight loaders of the layers expect whole tensors of a checkpoint, and cut this rank's shard out of them.
    for module in model.modules():
        for tensor in get_layer_tensors(module).values():
            tensor.weight_loader = default_weight_loader
        initialize_online_processing(module)
    names = set()
    for name, tensor in weights:
        module_name, _, own = name.rpartition(".")
        target = getattr(model.get_submodule(module_name), own)
        target.weight_loader(target, tensor)
        names.add(name)
    return names


def _located(model: torch.nn.Module, pending: _Pending) -> Located:
    """Where each of the new raw tensors is after post-processing."""
    keep = keep_policy(quantised_modules(model), pending.config)
    now = named_raw_tensors(model)
    located = Located()
    for name, tensor in pending.staging.items():
        current = now.get(name)
        if current is not None and current.stride() == tensor.stride() and same_bits(current, tensor):
            located.live[name] = weakref.ref(current)
        elif keep(name) is not Keep.NO:
            located.kept[name] = tensor
            located.reasons[name] = Keep.REFERENCE
        else:
            located.lost[name] = "vLLM rewrote it"
    return located
