"""ORIGIN: whether this engine loads from storage, or waits for the one that does and pulls from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from netloader.client.origin import Holders
from netloader.config import Config
from netloader.core.identity import ModelIdentity, Role, name_of
from netloader.core.model_key import key_of
from netloader.discovery.base import Backend, Wanted
from netloader.errors import NetloaderError
from netloader.vllm.model.agreement import Report, exchange, groups_of_this_engine
from netloader.vllm.serve.serving import WorkerServer

__all__ = ["asks", "loads_from_storage"]

log = logging.getLogger(__name__)

_SLACK = 60.0
"""Seconds that the other ranks wait longer than the one that asks."""


def asks(config: Config, registry: Backend | None) -> bool:
    """Whether the engines of this configuration ask which of them loads. With FALLBACK false, none may load."""
    return config.origin == "lease" and registry is not None and config.fallback


def loads_from_storage(
    registry: Backend,
    server: WorkerServer | None,
    identity: ModelIdentity | None,
    answers: Callable[[], bool],
    *,
    role: Role,
    rank: int,
    wait: float,
    useless: Collection[str] = (),
    over: str = "",
) -> str:
    """Wait until an engine serves the model, or this one is to load it from storage. All ranks decide together.

    The first rank of the engine asks the registry, and the others do what it tells them. It holds the lease until its
    model is served or refused.

    Args:
        registry: The registries.
        server: This worker's server.
        identity: The identity of this rank's share of the model; None for a model that is not supported.
        answers: Whether a source of SOURCE serves the model.
        role: The role of the model.
        rank: This rank.
        wait: Seconds to wait.
        useless: Generations and addresses of sources that were of no use to an earlier pull of this load.
        over: Why the first rank asks no more, and the engine loads from storage; empty to ask. Only what the first rank
            gives counts.

    Returns:
        Why this engine loads from storage; empty if there is a source to pull from.

    Raises:
        AgreementError: Another rank ended, or did not report in time.
    """
    groups = groups_of_this_engine(pipeline=role == "target")
    report = Report("pulled", rank)
    if not any(place for _, _, place in groups):
        why = over or _ask(registry, server, identity, answers, wait, useless)
        report = Report("default" if why else "pulled", rank, reason=why)
    first = exchange(report, groups, wait + _SLACK)[0]
    if first.outcome == "pulled":
        return ""
    log.info("netloader: rank %d: this engine loads the %s from storage: %s", rank, role, first.reason)
    return f"ORIGIN is lease, and this engine loads from storage: {first.reason}"


def _ask(
    registry: Backend,
    server: WorkerServer | None,
    identity: ModelIdentity | None,
    answers: Callable[[], bool],
    wait: float,
    useless: Collection[str],
) -> str:
    """Why this engine loads from storage; empty if it pulls. Raises nothing, because the other ranks wait."""
    try:
        claims = registry.claims()
        if server is None or claims is None:
            return "this rank has no server, so that no other engine could pull from it"
        if identity is None:
            return "this model can be neither pulled nor served"
        if answers():
            return ""
        found = registry.sources(Wanted(key_of(identity), role=identity.role))
        provider = Holders(found, name_of(identity), useless)
        turn = server.ask_turn(provider, claims, identity, what=name_of(identity), within=wait)
    except NetloaderError as error:
        return str(error)
    except Exception:
        log.exception("netloader: unexpected error while asking who loads the model")
        return "asking for the lease failed"
    return turn.why if turn.loads else ""
