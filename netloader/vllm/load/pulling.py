"""Asking sources from a worker's main thread: what they hold, and all of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netloader import sync
from netloader.config import Config
from netloader.core.addresses import Address
from netloader.core.identity import ModelIdentity, Role
from netloader.core.report import PullReport
from netloader.errors import TRANSIENT_CODES, ConfigError, MemoryStillInUse, NetloaderError, PeerLost, RefusedError
from netloader.observe.progress import ProgressLog
from netloader.transports import registry
from netloader.vllm.serve.server_loop import ServerLost

if TYPE_CHECKING:
    import torch

    from netloader.vllm.serve.serving import WorkerServer

__all__ = ["ask_sources", "check_transports", "only_processed", "pull_raw"]

log = logging.getLogger(__name__)

_ASK_TIMEOUT = 10.0
_ASK_PAUSE = 0.5


def check_transports(config: Config) -> None:
    """Find names that no transport has.

    Raises:
        ConfigError: TRANSPORT names one.
    """
    known = registry.known()
    for name in config.transport or ():
        if name not in known:
            raise ConfigError(field="TRANSPORT", value=name, allowed=f"auto, {', '.join(known)}")


def ask_sources(sources: Sequence[Address], role: Role, config: Config) -> ModelIdentity | None:
    """Identity of what the first source that answers holds; None when none of them does.

    Sources that are not up, or that will be ready soon, are asked again until WAIT is over; others only once. All of it
    takes at most WAIT and a few seconds, however many sources are silent.
    """
    until = time.monotonic() + config.wait
    last = min(until + _ASK_TIMEOUT, time.monotonic() + config.timeout)
    waiting = list(sources)
    while waiting:
        for source in tuple(waiting):
            left = last - time.monotonic()
            if left <= 0:
                return None
            try:
                found = sync.probe(
                    source,
                    role=role,
                    layouts=("raw", "processed"),
                    timeout=min(_ASK_TIMEOUT, left),
                    token=_secret(config),
                )
            except NetloaderError as error:
                log.info("netloader: source %s did not say what it holds: %s", source, error)
                if not _soon_over(error):
                    waiting.remove(source)
            else:
                return found.announcement.identity
        now = time.monotonic()
        if now >= until:
            return None
        time.sleep(min(_ASK_PAUSE, until - now))
    return None


def only_processed(sources: Sequence[Address], role: Role, config: Config, spent: float) -> list[Address]:
    """Those of `sources` that hold processed weights and no raw ones; each is asked once."""
    last = time.monotonic() + min(_ASK_TIMEOUT, config.timeout - spent)
    found = []
    for source in sources:
        left = last - time.monotonic()
        if left <= 0:
            break
        try:
            held = sync.probe(source, role=role, layouts=("raw", "processed"), timeout=left, token=_secret(config))
        except NetloaderError as error:
            log.debug("netloader: source %s holds no processed weights: %s", source, error)
        else:
            if held.announcement.identity.layout == "processed":
                found.append(source)
    return found


def _soon_over(error: NetloaderError) -> bool:
    if isinstance(error, RefusedError):
        return error.code in TRANSIENT_CODES
    return isinstance(error, PeerLost)


def pull_raw(
    tensors: Mapping[str, torch.Tensor],
    identity: ModelIdentity,
    sources: Sequence[Address],
    config: Config,
    spent: float = 0.0,
    server: WorkerServer | None = None,
) -> PullReport:
    """Fill `tensors` from the sources, every byte verified.

    Args:
        tensors: What is filled.
        identity: What has to match.
        sources: Where it comes from.
        config: Ours.
        spent: Seconds of TIMEOUT, and of WAIT within it, that asking the sources has taken already: the other ranks
            reckon with one TIMEOUT.
        server: This worker's server, which passes on what is there while the rest is being pulled (RELAY). It goes on
            until :meth:`~netloader.vllm.serve.serving.WorkerServer.withdraw`.

    Raises:
        MemoryStillInUse: Nothing else may fill the tensors any more.
        NetloaderError: Nothing was pulled, or not all; any of the tensors may have been written then.
    """
    try:
        if server is not None and server.running and config.relay:
            began = time.monotonic()
            try:
                return server.pull(tensors, identity, **_options(sources, config, spent))
            except ServerLost as error:
                log.warning("netloader: nothing is passed on while the weights are pulled: %s", error)
                spent += time.monotonic() - began
        return sync.pull(tensors, identity, **_options(sources, config, spent))
    except MemoryStillInUse as error:
        log.error("netloader: nothing else may fill this memory: %s", error)  # noqa: TRY400 - the message says it all
        raise


def _options(sources: Sequence[Address], config: Config, spent: float) -> dict[str, Any]:
    return {
        "sources": sources,
        "transport": config.transport or "auto",
        "timeout": max(0.001, config.timeout - spent),
        "wait": max(0.0, config.wait - spent),
        "stall_timeout": config.stall_timeout,
        "stripe": config.stripe,
        "token": _secret(config),
        "expect_root": config.expect_root,
        "progress": ProgressLog(lambda line: log.info("netloader: %s", line)),
    }


def _secret(config: Config) -> bytes | None:
    return None if config.token is None else config.token.reveal()
