"""Reloading a live engine from a neighbour: everything is pulled and verified beside the live weights first.

vLLM's `reload_weights` asks the loader for weights (`get_all_weights`), restores the model to how it was before
post-processing, layer by layer, hands over the weights, and post-processes again into the same memory. It expects names
and shapes as in a checkpoint; ours are those of the model's own tensors, this rank's share of them. So for this one
call the model takes them as they are.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from netloader.config import Config
from netloader.core.identity import Role
from netloader.errors import ManifestError, MemoryStillInUse, NetloaderError
from netloader.vllm.load.pulling import pull_raw
from netloader.vllm.model.agreement import Report, disagreement, exchange, groups_of_this_engine, load_digest
from netloader.vllm.model.copies import Keep
from netloader.vllm.model.fallback import fallback_loader
from netloader.vllm.model.registered import buffers_of, computed_names
from netloader.vllm.model.snapshot import Settled, named_raw_tensors, same_bits
from netloader.vllm.model.topology import topology_of
from netloader.vllm.serve.guard import serving_only
from netloader.vllm.serve.raw_holding import offered
from netloader.vllm.serve.retention import keep_policy, named, quantised_modules
from netloader.vllm.serve.serving import ROLES, WorkerServer, running_server

if TYPE_CHECKING:
    import torch

    from netloader.core.protocol.events import Announcement

__all__ = ["ReloadRefused", "abandon_reload", "finish_reload", "remember", "was_processed", "weights_for_reload"]

log = logging.getLogger(__name__)

_NOTE = "_netloader_loaded"
_PENDING = "_netloader_reload"
_PAUSED = "_netloader_paused"
_COMPUTED = "_netloader_computed"
_IN_USE = "_netloader_in_use"

_EXACT = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod", "Attention")
"""Methods and modules whose weights vLLM's own reload puts back as a first load does; each was compared byte by byte.
Others end with other bytes (W8A8 and MoE on CPUs, seen with vLLM 0.32), or were not compared."""

_SLACK = 60.0


class ReloadRefused(NetloaderError):
    """The weights of a live engine were not touched, since they could not be replaced exactly."""


@dataclass(frozen=True)
class _Loaded:
    """What a model was loaded with; lives as long as the model."""

    announcement: Announcement
    path: str


@dataclass
class _Pending:
    """A reload between the pull and the end of vLLM's post-processing; `taken` once vLLM has the weights."""

    staging: dict[str, torch.Tensor]
    announcement: Announcement
    load: str
    path: str
    config: Config
    rank: int
    taken: bool = False


def remember(model: torch.nn.Module, announcement: Announcement | None, path: str) -> None:
    """Note with a model what its raw tensors were; None when they are not known."""
    vars(model)[_NOTE] = None if announcement is None else _Loaded(announcement, path)


def was_processed(model: torch.nn.Module) -> bool:
    """Whether this loader has loaded the model already, so that vLLM has rewritten its weights since."""
    return _NOTE in vars(model)


def weights_for_reload(
    vllm_config: Any, model_config: Any, load_config: Any, config: Config, model: torch.nn.Module
) -> Iterable[tuple[str, torch.Tensor]]:
    """What vLLM's `reload_weights` is to load: pulled and verified, or read by the default loader without a SOURCE.

    Nothing of the live model is touched before all ranks have everything.

    Args:
        vllm_config: vLLM's configuration.
        model_config: The part that describes the model.
        load_config: How vLLM was told to load.
        config: Ours.
        model: The live model.

    Raises:
        ReloadRefused: The model stays as it is; the message says why.
    """
    rank = topology_of(vllm_config, model_config).rank
    sources = config.sources_for(rank)
    loaded: _Loaded | None = vars(model).get(_NOTE)
    reason = _why_not(model, loaded, str(model_config.model)) if sources else ""
    mine = Report("failed" if sources else "default", rank, reason=reason or config.why_no_source(rank) or "")
    staging: dict[str, torch.Tensor] = {}
    pulled: Announcement | None = None
    if sources and loaded is not None and not reason:
        identity = loaded.announcement.identity
        wanted = config.expect_root or loaded.announcement.root
        if wanted != loaded.announcement.root:
            identity = msgspec.structs.replace(identity, fingerprint="")  # other weights are what is asked for
        try:
            staging = _staging(loaded.announcement)
            log.info(
                "netloader: rank %d: reload: %.1f MB of staging memory, until the weights are in place",
                rank,
                sum(tensor.nbytes for tensor in set(staging.values())) / 1e6,
            )
            report = pull_raw(staging, identity, sources, msgspec.structs.replace(config, expect_root=wanted))
        except NetloaderError as error:
            mine = Report("failed", rank, reason=str(error))
            if isinstance(error, MemoryStillInUse):  # not to become the memory of something else, as long as this lives
                vars(model).setdefault(_IN_USE, []).append(staging)
        except (RuntimeError, MemoryError) as error:
            mine = Report("failed", rank, reason=f"no memory for the new weights beside the old ones: {error}")
        else:
            identity = msgspec.structs.replace(identity, fingerprint=report.identity.fingerprint)
            pulled = None if report.announcement is None else replace(report.announcement, identity=identity)
            mine = Report("pulled", rank, root=report.root, load=report.identity.load)
    reports = exchange(mine, groups_of_this_engine(pipeline=True), config.timeout + _SLACK)
    # What goes round is cut to fit; of this rank the whole reason is known, with the hint at its end.
    reports = tuple(mine if report.rank == rank else report for report in reports)
    outcomes = {report.outcome for report in reports}
    why = disagreement(reports) or ("some ranks have a SOURCE and some have none" if len(outcomes) > 1 else "")
    if why:
        log.warning("netloader: rank %d: the weights stay as they are: %s", rank, why)
        raise ReloadRefused(
            f"rank {rank}: the weights stay as they are: {why}",
            hint="reload from a source that has the weights which were loaded, or name others by EXPECT_ROOT",
        )
    _note_computed(model)
    if not sources:
        return _by_default(model_config, load_config, config, model, rank)
    if pulled is None:
        raise ReloadRefused("nothing was pulled, and no rank said so", hint="this is a bug of netloader")
    _pause(model, "the weights are being reloaded")
    load = load_digest(report.root for report in reports)
    return _handed_over(model, _Pending(staging, pulled, load, str(model_config.model), config, rank))


def finish_reload(model: torch.nn.Module) -> None:
    """The reload is over, post-processing included: serve the new weights, where they can be served exactly.

    What failed here costs what is served; the reload itself went well.
    """
    _restore_computed(model)
    pending: _Pending | None = vars(model).pop(_PENDING, None)
    paused: Sequence[Role] = vars(model).pop(_PAUSED, ())
    server = running_server()
    if pending is None or not pending.taken:
        if server is not None:
            server.forget_paused(ROLES)
        return
    announcement = pending.announcement
    remember(model, announcement, pending.path)
    log.info("netloader: rank %d: reloaded, root %s", pending.rank, announcement.root)
    if server is None:
        return
    role = announcement.identity.role
    server.forget_paused([role])
    with serving_only("serving the reloaded weights", server, [role]):
        _serve(model, pending, server)
    _resume(server, [other for other in paused if other != role], "the reload of the other model is over")


def _serve(model: torch.nn.Module, pending: _Pending, server: WorkerServer) -> None:
    announcement = pending.announcement
    device = str(next(iter(named_raw_tensors(model).values())).device)  # not that of the staging memory
    settled = _settled(model, pending)
    if settled.lost:
        server.refuse(
            announcement.identity.role,
            f"reloaded weights were rewritten and not kept: {named(settled.lost)}",
            "set KEEP_RAW to true on the server",
        )
        return
    server.offer(
        offered(announcement, device, settled, pending.load),
        f"reloaded, {settled.kept_bytes / 1e6:.1f} MB of originals kept, root {announcement.root}",
    )


def abandon_reload(model: torch.nn.Module) -> None:
    """The reload broke: what was pulled for it is let go, and what was served is served again if it is what it was.

    Some of the weights may be new ones, and some may be gone: then clients hear which.
    """
    _restore_computed(model)
    pending: _Pending | None = vars(model).pop(_PENDING, None)
    if pending is not None:
        pending.staging.clear()  # whoever keeps the error keeps what refers to it
        vars(model).pop("load_weights", None)
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


def _note_computed(model: torch.nn.Module) -> None:
    """Remember which buffers are computed and in no checkpoint: vLLM 0.23 forgets it of all that it restores."""
    vars(model)[_COMPUTED] = [(module, frozenset(computed_names(module))) for module in model.modules()]


def _restore_computed(model: torch.nn.Module) -> None:
    for module, computed in vars(model).pop(_COMPUTED, ()):
        computed_names(module).update(computed & {name for name, _ in buffers_of(module)})


def _why_not(model: torch.nn.Module, loaded: _Loaded | None, path: str) -> str:
    """Why a reload would not be exact; empty when it would."""
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
            if type(method).__name__ not in _EXACT:
                other[name] = type(method).__name__
        elif hasattr(module, "process_weights_after_loading") and type(module).__name__ not in _EXACT:
            other[name] = type(module).__name__  # it derives tensors in a way of its own
    if other:
        some = named(f"{name} ({method})" for name, method in other.items())
        return f"vLLM's own reload does not put back exactly what a first load does for {some}"
    return ""


def _staging(announcement: Announcement) -> dict[str, torch.Tensor]:
    """Memory for all raw tensors, in the host's: a device has no room for its weights twice."""
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
    vars(model)[_NOTE] = None  # what it was loaded with is over
    found: Iterable[tuple[str, torch.Tensor]] = weights(model_config, model)
    return found


def _pause(model: torch.nn.Module, reason: str) -> None:
    server = running_server()
    with serving_only("retracting what is served before a reload", server):
        if server is not None:
            vars(model)[_PAUSED] = server.pause(ROLES, reason)


def _handed_over(model: torch.nn.Module, pending: _Pending) -> Iterator[tuple[str, torch.Tensor]]:
    """What is returned to vLLM, after `model` was made to take it as it is, once."""
    reference = weakref.ref(model)

    def load_weights(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        found = reference()
        if found is None:
            raise ReloadRefused("the model is gone", hint="this is a bug of netloader")
        pending.taken = True
        del found.load_weights
        return _fill_restored(found, weights)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        if not pending.taken:
            # vLLM would copy them over live tensors by name, which are what its post-processing made of such.
            raise ReloadRefused(
                f"rank {pending.rank}: the weights stay as they are: raw weights were pulled, and reload_weights was "
                "called for weights that are processed already",
                hint="call it with is_checkpoint_format=True, which is its default",
            )
        yield from pending.staging.items()

    vars(model)["load_weights"] = load_weights
    vars(model)[_PENDING] = pending
    return weights()


def _fill_restored(model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Give raw tensors to a model that vLLM has restored to how it was before post-processing."""
    from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
    from vllm.model_executor.model_loader.reload.utils import get_layer_tensors
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    # The loaders that layers bring take whole tensors of a checkpoint and cut this rank's share out of them.
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


def _settled(model: torch.nn.Module, pending: _Pending) -> Settled:
    """Where each of the new raw tensors is now."""
    keep = keep_policy(quantised_modules(model), pending.config)
    now = named_raw_tensors(model)
    settled = Settled()
    for name, tensor in pending.staging.items():
        current = now.get(name)
        if current is not None and current.stride() == tensor.stride() and same_bits(current, tensor):
            settled.live[name] = weakref.ref(current)
        elif keep(name) is not Keep.NO:
            settled.kept[name] = tensor
            settled.reasons[name] = Keep.REFERENCE
        else:
            settled.lost[name] = "vLLM rewrote it"
    return settled
