"""First step of a load: inspect the engine's configuration and probe the sources, before vLLM builds the model."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from netloader.config import Config
from netloader.core.addresses import Address
from netloader.core.identity import ModelIdentity, Role, check_sendable
from netloader.core.model_key import rank_of
from netloader.discovery.base import Backend
from netloader.discovery.configured import registries_of
from netloader.errors import ConfigError, NetloaderError
from netloader.vllm.load.choose_origin import asks, loads_from_storage
from netloader.vllm.load.drafts import left_out, named_like_target, served_name, shares_with_target
from netloader.vllm.load.file_reads import FileReads
from netloader.vllm.load.find_sources import OfRank, find_sources
from netloader.vllm.load.processed_pull import Registrations
from netloader.vllm.load.pulling import check_transports, patience, probe_sources
from netloader.vllm.load.tied_embeddings import adopt_untied, could_adopt, tied_by_files
from netloader.vllm.model.fallback import fallback_loader
from netloader.vllm.model.folders import folder_of
from netloader.vllm.model.identity import identity_of, role_of
from netloader.vllm.model.quantisation import why_unknown
from netloader.vllm.model.settings import Settings, settings_of
from netloader.vllm.model.topology import Topology, topology_of
from netloader.vllm.serve.guard import refuse_on_failure, serving_only
from netloader.vllm.serve.serving import WorkerServer, worker_server

__all__ = [
    "Context",
    "Engine",
    "NothingPulled",
    "Probed",
    "inspect",
    "inspect_built",
    "model_identity",
    "why_not_comparable",
]

log = logging.getLogger(__name__)


class NothingPulled(NetloaderError):
    """No weights could be pulled, and FALLBACK forbids the default loader."""


@dataclass(frozen=True)
class Engine:
    """What vLLM passes to a loader.

    Attributes:
        vllm_config: vLLM's configuration for this model.
        model_config: The part of it that describes the model.
        load_config: How vLLM was told to load.
    """

    vllm_config: Any
    model_config: Any
    load_config: Any

    @property
    def role(self) -> Role:
        """Whether the model is the target or its draft."""
        return role_of(self.model_config)

    @property
    def device(self) -> str:
        """The device on which the model is built, as torch names it."""
        wanted = self.load_config.device
        return str(self.vllm_config.device_config.device if wanted is None else wanted)

    @property
    def loads_draft_next(self) -> bool:
        """Whether this worker loads a draft model after this one."""
        speculative = getattr(self.vllm_config, "speculative_config", None)
        draft = None if speculative is None else getattr(speculative, "draft_model_config", None)
        return self.role == "target" and draft is not None and role_of(draft) == "draft"


@dataclass(frozen=True)
class Probed:
    """What the probe of the sources has shown, before the model is built.

    Attributes:
        identity: The identity of the model; with untied embeddings if the source's weight files untie them.
        load_state: Facts that loading set at the source (see :mod:`netloader.vllm.model.load_state`).
    """

    identity: ModelIdentity
    load_state: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What is known before vLLM builds the model.

    Attributes:
        engine: What vLLM passed to the loader.
        config: netloader's configuration.
        topology: This worker's place in its engine.
        sources: Addresses to pull from, in order: those of SOURCE, then those found in DISCOVERY before the build.
        default_loader: vLLM's loader to fall back to; None if FALLBACK forbids it.
        reads: Records which tensors the model's constructor reads from files.
        registrations: Builds the model a second time; None if the model existed before this load.
        server: This worker's server; None if it serves nobody.
        probed: The identity of the model, and what the sources answered; None if the identity could not be determined.
        settings: Settings of the engine that decide tensors, as they were before vLLM built the model.
        post_processing: Holds the contexts in which vLLM's post-processing has to run.
        registry: Finds sources while the model is pulled; None without DISCOVERY.
        why_no_source: Why there is nothing to pull from; empty when there is.
        seconds: How long the search and the probe of the sources took.
    """

    engine: Engine
    config: Config
    topology: Topology
    sources: Sequence[Address]
    default_loader: Any
    reads: FileReads
    registrations: Registrations | None = None
    server: WorkerServer | None = None
    probed: Probed | None = None
    settings: Settings = field(default_factory=Settings)
    post_processing: ExitStack = field(default_factory=ExitStack)
    registry: Backend | None = None
    why_no_source: str = ""
    seconds: float = 0.0

    @property
    def rank(self) -> int:
        """This worker's rank."""
        return self.topology.rank

    @property
    def role(self) -> Role:
        """Whether the model is the target or its draft."""
        return self.engine.role

    @property
    def leased(self) -> bool:
        """Whether a lease decides which engine loads from storage."""
        return asks(self.config, self.registry)

    @property
    def shares(self) -> bool:
        """Whether this is a draft that uses tensors of its target."""
        return shares_with_target(self.engine.vllm_config, self.role)

    def left_out(self, names: Iterable[str], state: Mapping[str, bool]) -> frozenset[str]:
        """Names of tensors that are neither pulled nor served, because the draft uses the target's."""
        return left_out(names, state, pp_size=self.topology.pp_size) if self.shares else frozenset()


def inspect(engine: Engine, config: Config, prefix: str = "") -> Context:
    """Check the configuration, open the server, and probe the sources for facts that decide how the model is built.

    A probe that fails unexpectedly is logged and not raised, because the default loader may still run.

    Args:
        engine: What vLLM passed to the loader. Its model configuration is changed if a source has untied embeddings.
        config: netloader's configuration.
        prefix: The name under which vLLM builds the model.

    Raises:
        ConfigError: The configuration can't work with this vLLM.
        NothingPulled: There is nothing to pull from, and FALLBACK forbids the default loader.
    """
    topology = topology_of(engine.vllm_config, engine.model_config)
    rank, began = topology.rank, time.monotonic()
    for override in config.overrides:
        log.info("netloader: %s", override)
    for warning in config.warnings:
        log.warning("netloader: %s", warning)
    check_transports(config)
    registry = registries_of(config)
    # Always made, so that an invalid FALLBACK_FORMAT is reported before anything is loaded.
    default_loader = _default_loader(engine, config)
    registrations = Registrations(engine.vllm_config, engine.model_config, prefix, engine.device)
    settings = _settings(engine)
    server = _open_server(engine, config, rank)
    with refuse_on_failure(server, engine.role):
        if registry is not None:
            registry = OfRank(registry, _share(topology), tuple if server is None else server.own_addresses)
        identity = _identity(engine, config, topology, settings)
        why_no_source = _why_storage(engine, config, topology, settings, registry, server, identity)
        left = patience(config, time.monotonic() - began, leased=asks(config, registry))
        sources = () if why_no_source else _sources(config, topology, identity, registry, left)
        if not why_no_source and not sources and not asks(config, registry):
            why_no_source = _why_no_source(config, rank)
        if default_loader is None and not sources:
            raise NothingPulled(
                f"rank {rank} has nothing to pull from ({why_no_source}), and FALLBACK is false",
                hint="give it a SOURCE, or leave FALLBACK out",
            )
        at_most = msgspec.structs.replace(config, wait=patience(config, leased=asks(config, registry)))
        probed = None if identity is None else _probe(engine, at_most, topology, identity, sources)
    return Context(
        engine,
        config,
        topology,
        sources,
        default_loader,
        _reads(engine),
        registrations,
        server,
        probed,
        settings,
        registry=registry,
        why_no_source=why_no_source,
        seconds=time.monotonic() - began,
    )


def _share(topology: Topology) -> int:
    """The rank to look for in registries."""
    place = ModelIdentity(
        tp_size=topology.tp_size, tp_rank=topology.tp_rank, pp_rank=topology.pp_rank, ep_size=topology.ep_size
    )
    return rank_of(place, topology.rank)


def _why_storage(
    engine: Engine,
    config: Config,
    topology: Topology,
    settings: Settings,
    registry: Backend | None,
    server: WorkerServer | None,
    identity: ModelIdentity | None,
) -> str:
    """Why this engine is the one that loads from storage; empty if ORIGIN does not ask for one, or it is another one.

    Raises nothing before the ranks have exchanged the answer, because the other ranks wait for this one.

    Raises:
        AgreementError: Another rank ended, or did not report in time.
    """
    if registry is None or not asks(config, registry):
        return ""
    if identity is not None and why_not_comparable(identity, settings):
        identity = None
    given = config.sources_for(topology.rank)
    at_once = msgspec.structs.replace(config, wait=0.0)

    def answers() -> bool:
        return bool(given) and probe_sources(given, engine.role, at_once) is not None

    return loads_from_storage(
        registry, server, identity, answers, role=engine.role, rank=topology.rank, wait=config.wait
    )


def _sources(
    config: Config, topology: Topology, identity: ModelIdentity | None, registry: Backend | None, wait: float
) -> tuple[Address, ...]:
    """The addresses of SOURCE, then those that DISCOVERY knows. With a SOURCE, no other one is waited for here."""
    given = config.sources_for(topology.rank)
    if registry is None or identity is None:
        return given
    wait = 0.0 if given else wait
    try:
        found = find_sources(registry, identity, topology.rank, wait=wait, zone=config.zone)
    except Exception:
        log.exception("netloader: rank %d: unexpected error while searching for sources", topology.rank)
        found = []
    return tuple(dict.fromkeys((*given, *found)))


def _why_no_source(config: Config, rank: int) -> str:
    why = config.why_no_source(rank) or ""
    if not config.discovery:
        return why
    nobody = "no server of this model was found in DISCOVERY" + (f" within {config.wait:g} s" if config.wait else "")
    return nobody if config.source is None else f"{why}, and {nobody}"


def inspect_built(engine: Engine, config: Config) -> Context:
    """The context for a model that exists already. It is only filled; it is neither served nor built again.

    Raises:
        ConfigError: vLLM has no loader for FALLBACK_FORMAT.
    """
    topology = topology_of(engine.vllm_config, engine.model_config)
    sources = config.sources_for(topology.rank)
    default_loader, settings = _default_loader(engine, config), _settings(engine)
    why = config.why_no_source(topology.rank) or ""
    identity = _identity(engine, config, topology, settings)
    return Context(
        engine,
        config,
        topology,
        sources,
        default_loader,
        FileReads(),
        probed=None if identity is None else Probed(identity),
        settings=settings,
        why_no_source=why,
    )


def model_identity(engine: Engine, config: Config, topology: Topology, settings: Settings) -> ModelIdentity:
    """The identity that a source must match, without the fingerprint of the checkpoint."""
    named = named_like_target(engine.vllm_config, engine.model_config, engine.role)
    return identity_of(
        engine.model_config,
        topology,
        name=config.model if named else config.draft_model,
        served=served_name(engine.vllm_config, engine.model_config, engine.role),
        tied=tied_by_files(engine.model_config),
        settings=settings,
        cache_config=getattr(engine.vllm_config, "cache_config", None),
        load_config=engine.load_config,
    )


def _identity(engine: Engine, config: Config, topology: Topology, settings: Settings) -> ModelIdentity | None:
    """The identity of the model; None if it could not be determined, which is logged: the other ranks wait.

    Made once, before the build: layers change vLLM's configuration while they are constructed, so that later it would
    be another one than at a client that looks for this model.
    """
    try:
        return model_identity(engine, config, topology, settings)
    except Exception:
        log.exception("netloader: rank %d: looking at the model failed: nothing is pulled or served", topology.rank)
        return None


def why_not_comparable(identity: ModelIdentity, settings: Settings) -> str:
    """Why a model with this identity can be neither pulled nor served; empty if its identity is no reason."""
    return why_unknown(identity) or settings.unknown or _why_not_sendable(identity)


def _why_not_sendable(identity: ModelIdentity) -> str:
    try:
        check_sendable(identity)
    except ConfigError as error:
        return error.message
    return ""


def _default_loader(engine: Engine, config: Config) -> Any:
    if not config.fallback:
        return None
    return fallback_loader(engine.load_config, config.fallback_format, config.fallback_config)


def _reads(engine: Engine) -> FileReads:
    folder: Path | None = None
    with serving_only("looking for the model's folder", None):
        folder = folder_of(engine.model_config)
    return FileReads(folder)


def _settings(engine: Engine) -> Settings:
    found: Settings | None = None
    with serving_only("reading the settings of the engine", None):
        folder = folder_of(engine.model_config)
        found = settings_of(engine.vllm_config, engine.model_config, engine.role, folder)
    unknown = "the settings of the engine that decide tensors could not be read"
    return Settings(unknown=unknown) if found is None else found


def _open_server(engine: Engine, config: Config, rank: int) -> WorkerServer | None:
    server: WorkerServer | None = None
    with serving_only("starting the server", None):
        server = worker_server(config, rank, engine.device)
    if server is not None:
        with serving_only("announcing what is being loaded", server):
            server.expect(engine.role, "the model is still being loaded")
            if engine.loads_draft_next:
                server.expect("draft", "the draft model is loaded after its target")
    return server


def _probe(
    engine: Engine, config: Config, topology: Topology, identity: ModelIdentity, sources: Sequence[Address]
) -> Probed:
    try:
        return _probed(engine, config, topology, identity, sources)
    except Exception:
        log.exception("netloader: rank %d: unexpected error while the sources were probed", topology.rank)
        return Probed(identity)


def _probed(
    engine: Engine, config: Config, topology: Topology, identity: ModelIdentity, sources: Sequence[Address]
) -> Probed:
    may_untie = identity.tied is None and could_adopt(engine.model_config)
    if not may_untie and not shares_with_target(engine.vllm_config, engine.role):
        return Probed(identity)
    source = probe_sources(sources, engine.role, config)
    if source is None:
        return Probed(identity)
    if may_untie and adopt_untied(engine.model_config, source):
        identity = msgspec.structs.replace(identity, tied=False)
        log.info(
            "netloader: rank %d: config.json says that the embeddings are tied, the source's weight files have an "
            "output embedding of its own; the %s is built as the source's is",
            topology.rank,
            engine.role,
        )
    # The load state says which tensors of a draft the checkpoint fills. Only a load from files finds that out.
    return Probed(identity, source.load_state)
