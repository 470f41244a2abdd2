"""Probing sources and pulling from them, in a worker's main thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netloader import sync
from netloader.config import Config
from netloader.core.addresses import Address
from netloader.core.identity import ModelIdentity, Role, is_digest
from netloader.core.report import PullReport
from netloader.core.texts import LINE, one_line
from netloader.discovery.base import Backend
from netloader.errors import (
    TRANSIENT_CODES,
    ConfigError,
    MemoryStillInUse,
    NetloaderError,
    PeerLost,
    RefusedError,
    RemoteProtocolError,
    shown,
    without_source,
)
from netloader.observe.events import SourceWaiting
from netloader.observe.progress import ProgressLog
from netloader.transports import registry
from netloader.vllm.serve.server_loop import ServerLost

if TYPE_CHECKING:
    import torch

    from netloader.vllm.serve.serving import WorkerServer

__all__ = ["check_digests", "check_transports", "only_processed", "patience", "probe_sources", "pull_raw"]

log = logging.getLogger(__name__)

_PROBE_TIMEOUT = 10.0
_PROBE_PAUSE = 0.5
_WAIT_LINE_EVERY = 10.0
"""Seconds between two lines about one wait."""

_PULL_WAIT = 5.0
"""Seconds that a pull goes on trying sources that are not ready, before it is asked anew who loads."""


def patience(config: Config, spent: float = 0.0, *, leased: bool) -> float:
    """Seconds to wait for sources that are not ready or do not exist yet.

    That is what is left of WAIT; with a lease a few seconds at most, because another engine may load if one is lost.

    Args:
        config: netloader's configuration.
        spent: Seconds of WAIT that have passed.
        leased: Whether it is asked anew who loads.
    """
    left = max(0.0, config.wait - spent)
    return min(left, _PULL_WAIT) if leased else left


def check_transports(config: Config) -> None:
    """Check the names in TRANSPORT.

    Raises:
        ConfigError: A name is not that of a transport.
    """
    known = registry.known()
    for name in config.transport or ():
        if name not in known:
            raise ConfigError(field="TRANSPORT", value=name, allowed=f"auto, {', '.join(known)}")


def probe_sources(sources: Sequence[Address], role: Role, config: Config) -> ModelIdentity | None:
    """Probe the sources in order, until one announces its weights.

    A source that is not up, or that may be ready soon, is probed again until WAIT is over. Any other source is probed
    once. The function takes at most WAIT plus a few seconds, whatever the number of sources that do not answer.

    Returns:
        The identity that the first source announced; None when no source did.
    """
    began = say_at = time.monotonic()
    until = began + config.wait
    last = min(until + _PROBE_TIMEOUT, time.monotonic() + config.timeout)
    waiting = list(sources)
    reasons: dict[Address, str] = {}
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
                    timeout=min(_PROBE_TIMEOUT, left),
                    token=_token(config),
                )
            except NetloaderError as error:
                reasons[source] = one_line(without_source(error.message, source))
                if not _is_temporary(error) or not config.wait:
                    log.info("netloader: source %s did not say what it holds: %s", source, _reason(source, error))
                if not _is_temporary(error):
                    waiting.remove(source)
            else:
                return found.announcement.identity
        now = time.monotonic()
        if now >= until or not waiting:
            return None
        if now >= say_at:
            who = waiting[0] + (f" and {len(waiting) - 1} more" if len(waiting) > 1 else "")
            waited = now - began
            log.info("netloader: %s", SourceWaiting(waited, who, reasons[waiting[0]], waited, config.wait))
            say_at = now + _WAIT_LINE_EVERY
        time.sleep(min(_PROBE_PAUSE, until - now))
    return None


def only_processed(sources: Sequence[Address], role: Role, config: Config, spent: float) -> list[Address]:
    """Those of `sources` that hold processed weights and no raw ones. Each source is probed once."""
    last = time.monotonic() + min(_PROBE_TIMEOUT, config.timeout - spent)
    found = []
    for source in sources:
        left = last - time.monotonic()
        if left <= 0:
            break
        try:
            held = sync.probe(source, role=role, layouts=("raw", "processed"), timeout=left, token=_token(config))
        except NetloaderError as error:
            log.debug("netloader: source %s holds no processed weights: %s", source, _reason(source, error))
        else:
            if held.announcement.identity.layout == "processed":
                found.append(source)
    return found


def _reason(source: Address, error: NetloaderError) -> str:
    return one_line(without_source(str(error), source), LINE)


def _is_temporary(error: NetloaderError) -> bool:
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
    registry: Backend | None = None,
    leased: bool = False,
) -> PullReport:
    """Fill `tensors` from the sources and verify every block.

    Args:
        tensors: The tensors to fill, by name.
        identity: The identity that a source must match.
        sources: Addresses to pull from, in order.
        config: netloader's configuration.
        spent: Seconds of TIMEOUT and WAIT that the probe of the sources has taken already. The other ranks wait for one
            TIMEOUT only.
        server: This worker's server. With RELAY it passes on the verified blocks while the rest is pulled, and until
            :meth:`~netloader.vllm.serve.serving.WorkerServer.withdraw`.
        registry: Finds further sources.
        leased: Whether it is asked anew who loads if the pull fails, so that it fails soon.

    Raises:
        MemoryStillInUse: A thread may still write into the tensors. Nothing else may fill them.
        NetloaderError: The pull failed. Any of the tensors may have been written.
    """
    try:
        if server is not None and server.running and config.relay:
            began = time.monotonic()
            try:
                return server.pull(tensors, identity, **_options(sources, config, spent, registry, leased))
            except ServerLost as error:
                log.warning("netloader: nothing is passed on while the weights are pulled: %s", error)
                spent += time.monotonic() - began
        return sync.pull(tensors, identity, **_options(sources, config, spent, registry, leased))
    except MemoryStillInUse as error:
        log.error("netloader: nothing else may fill this memory: %s", error)  # noqa: TRY400 - the message says it all
        raise


def check_digests(theirs: ModelIdentity) -> None:
    """Check that `load` and `fingerprint` are digests, because they are sent to other ranks and to clients.

    Args:
        theirs: The identity that a source announced.

    Raises:
        RemoteProtocolError: One of them is not a digest.
    """
    for field in ("load", "fingerprint"):
        if not is_digest(getattr(theirs, field)):
            raise RemoteProtocolError(
                f"the source's {field} is no digest: {shown(getattr(theirs, field))}",
                hint="use a source that runs a release of netloader",
            )


def _options(
    sources: Sequence[Address], config: Config, spent: float, registry: Backend | None, leased: bool
) -> dict[str, Any]:
    return {
        "sources": sources,
        "discovery": registry,
        "zone": config.zone,
        "transport": config.transport or "auto",
        "timeout": max(0.001, config.timeout - spent),
        "wait": patience(config, spent, leased=leased),
        "stall_timeout": config.stall_timeout,
        "stripe": config.stripe,
        "token": _token(config),
        "expect_root": config.expect_root,
        "progress": ProgressLog(lambda line: log.info("netloader: %s", line), last=False),
    }


def _token(config: Config) -> bytes | None:
    return None if config.token is None else config.token.reveal()
