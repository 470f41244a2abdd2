"""Prometheus metrics of pulls and servers, counted from their events by ``prometheus-client`` (extra ``metrics``).

Names are ``netloader_<noun>_<unit>``, in seconds and bytes. The values of each label come from a closed list, so that
no peer and no number of replicas can add series.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, get_args

from netloader.core.messages import RefusalCode
from netloader.core.version import own_version
from netloader.errors import (
    CheckpointError,
    ConfigError,
    DigestMismatch,
    DiscoveryError,
    ManifestError,
    NoSourceLeft,
    PeerLost,
    ProtocolError,
    RefusedError,
    RootMismatch,
    TransferTimeout,
    TransportError,
    TransportUnavailable,
)
from netloader.observe.events import (
    BlocksSent,
    BlocksVerified,
    Event,
    PhaseEnded,
    PullBegan,
    PullEnded,
    ServingStarted,
    ServingStopped,
    SessionBegan,
    SessionEnded,
    SourceChosen,
    SourceLeft,
    TransportChosen,
)

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["BUCKETS", "REASONS", "Metrics", "reason_of"]

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of all histograms, in seconds."""

_OTHER = "other"
_TRANSPORTS = frozenset({"gloo", "hccl", "memory", "shm", "tcp"})
_ROLES = frozenset({"target", "draft"})
_LAYOUTS = frozenset({"raw", "processed", "checkpoint"})

_FAMILIES: Mapping[type[BaseException], str] = {
    DigestMismatch: "digest",
    RootMismatch: "root",
    NoSourceLeft: "no_source",
    TransferTimeout: "timeout",
    PeerLost: "peer_lost",
    TransportUnavailable: "transport_unavailable",
    TransportError: "transport",
    ProtocolError: "protocol",
    ManifestError: "manifest",
    CheckpointError: "checkpoint",
    ConfigError: "config",
    DiscoveryError: "discovery",
}
"""Families of errors, from special to general."""

_REFUSALS: Mapping[str, str] = {code: f"refused_{code.replace('-', '_')}" for code in get_args(RefusalCode)}

REASONS = frozenset({"", _OTHER, *_FAMILIES.values(), *_REFUSALS.values()})
"""Values of the label ``reason``."""


def reason_of(error: BaseException | None) -> str:
    """The value of the label ``reason`` for an error: one of :data:`REASONS`, empty for no error.

    A pull that failed with one cause at all of its sources has the reason of that cause.
    """
    if error is None:
        return ""
    if isinstance(error, RefusedError):
        return _REFUSALS.get(error.code, _OTHER)
    if isinstance(error, NoSourceLeft):
        causes = {reason_of(attempt.cause) for attempt in error.attempts}
        return causes.pop() if len(causes) == 1 else _FAMILIES[NoSourceLeft]
    return next((reason for kind, reason in _FAMILIES.items() if isinstance(error, kind)), _OTHER)


def _outcome(event: SessionEnded) -> str:
    if event.error is None:
        return "probed" if event.probe else "done"
    if event.stray:
        return "stray"
    return "refused" if isinstance(event.error, RefusedError) else "failed"


def _of_process() -> CollectorRegistry:
    from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


def _one_of(value: str, allowed: frozenset[str]) -> str:
    return value if value in allowed else _OTHER


class Metrics:
    """An observer that counts. One of it may observe any number of pulls and servers, from several threads.

    Args:
        registry: Where the metrics are registered, once; by default a new one, with what ``prometheus_client`` says
            about processes.
        field: What asks for metrics, for errors.

    Attributes:
        registry: As given, or the new one.

    Raises:
        ConfigError: ``prometheus-client`` is not installed, or the registry has metrics of netloader already.
    """

    def __init__(self, registry: CollectorRegistry | None = None, *, field: str = "metrics") -> None:
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise ConfigError(
                field=field,
                value="on",
                allowed="an installation with prometheus-client",
                hint="install the extra `metrics`: pip install 'netloader[metrics]'",
            ) from error
        self.registry = ours = _of_process() if registry is None else registry
        try:
            build = prometheus.Gauge(
                "netloader_build_info", "1", ["version"], registry=ours, multiprocess_mode="livemax"
            )
        except ValueError as error:
            raise ConfigError(
                field="registry",
                value=type(ours).__name__,
                allowed="a registry without metrics of netloader",
                hint="make one `Metrics`, and give it to all pulls and servers",
            ) from error
        build.labels(own_version()).set(1)

        def counter(name: str, text: str, *labels: str) -> prometheus.Counter:
            return prometheus.Counter(f"netloader_{name}", text, labels, registry=ours)

        def gauge(name: str, text: str, *labels: str) -> prometheus.Gauge:
            return prometheus.Gauge(f"netloader_{name}", text, labels, registry=ours, multiprocess_mode="livesum")

        def histogram(name: str, text: str, *labels: str) -> prometheus.Histogram:
            return prometheus.Histogram(f"netloader_{name}", text, labels, registry=ours, buckets=BUCKETS)

        outcome = ("role", "outcome", "reason")
        self._pulls = counter("pulls_total", "Pulls that ended, by outcome.", *outcome)
        self._pull_seconds = histogram("pull_seconds", "Duration of pulls.", "role", "outcome")
        self._running = gauge("pulls_running", "Pulls that run.", "role")
        self._waits = counter("wait_seconds_total", "Seconds in which no source had accepted a pull.")
        self._phases = histogram("phase_seconds", "Duration of the phases of sessions.", "side", "phase")
        self._chosen = counter("sources_chosen_total", "Sources that a pull connected to.", "found_by")
        self._left = counter("sources_left_total", "Sources that a pull stopped using.", "outcome", "reason")
        self._bytes = counter("bytes_total", "Bytes sent, and bytes received and verified.", "side", "transport")
        self._blocks = counter("blocks_total", "Blocks sent, and received and verified.", "side", "transport")
        self._again = counter("blocks_refetched_total", "Blocks that were asked for and lost: pulled again.")
        self._digests = counter("digest_mismatches_total", "Blocks that were not what was announced.")
        self._failovers = counter("failovers_total", "Sources that failed after they delivered blocks.", "reason")
        self._sessions = counter("sessions_total", "Sessions that ended.", "side", "transport", "outcome", "reason")
        self._session_seconds = histogram("session_seconds", "Duration of sessions.", "side", "transport")
        self._refusals = counter("refusals_total", "Refusals given (server) and received (client).", "side", "reason")
        self._clients = gauge("clients", "Clients with an open channel to this server.", "transport")
        self._connections = gauge("connections", "Control connections to this server.")
        self._served = gauge("served_bytes", "Bytes of the weights that this server offers.", "role", "layout")
        self._lock = threading.Lock()
        self._serving: dict[tuple[str, str, str], int] = {}

    def __call__(self, event: Event) -> None:
        """Count `event`. An event that has no metric is ignored."""
        match event:
            case PullBegan() | PullEnded() | SourceChosen() | SourceLeft():
                self._of_pull(event)
            case SessionBegan() | TransportChosen() | SessionEnded():
                self._of_session(event)
            case BlocksVerified():
                self._moved("client", event.transport, event.blocks, event.nbytes)
            case BlocksSent():
                self._moved("server", event.transport, event.blocks, event.nbytes)
            case PhaseEnded():
                self._phases.labels(event.side, event.phase).observe(event.seconds)
            case ServingStarted():
                self._offered(event)
            case ServingStopped():
                self._withdrawn(event)

    def _of_pull(self, event: PullBegan | PullEnded | SourceChosen | SourceLeft) -> None:
        match event:
            case PullBegan():
                self._running.labels(_one_of(event.role, _ROLES)).inc()
            case PullEnded():
                self._pull_ended(event)
            case SourceChosen():
                self._chosen.labels("server" if event.named_by else "provider").inc()
            case SourceLeft(error=error):
                outcome = "used" if error is None else "refused" if isinstance(error, RefusedError) else "failed"
                self._left.labels(outcome, reason_of(error)).inc()

    def _of_session(self, event: SessionBegan | TransportChosen | SessionEnded) -> None:
        match event:
            case SessionBegan(side="server"):
                self._connections.inc()
            case TransportChosen(side="server"):
                self._clients.labels(_one_of(event.transport, _TRANSPORTS)).inc()
            case SessionEnded():
                self._session_ended(event)

    def _moved(self, side: str, transport: str, blocks: int, nbytes: int) -> None:
        named = _one_of(transport, _TRANSPORTS)
        self._bytes.labels(side, named).inc(nbytes)
        self._blocks.labels(side, named).inc(blocks)

    def _pull_ended(self, event: PullEnded) -> None:
        role = _one_of(event.role, _ROLES)
        outcome = "pulled" if event.report else "failed" if event.error else "cancelled"
        self._running.labels(role).dec()
        self._pulls.labels(role, outcome, reason_of(event.error)).inc()
        self._pull_seconds.labels(role, outcome).observe(event.seconds)
        if event.report is not None:
            self._waits.inc(event.report.waited)

    def _session_ended(self, event: SessionEnded) -> None:
        error, transport = event.error, _one_of(event.transport, _TRANSPORTS) if event.transport else ""
        reason = reason_of(error)
        outcome = _outcome(event)
        self._sessions.labels(event.side, transport, outcome, reason).inc()
        self._session_seconds.labels(event.side, transport).observe(event.seconds)
        if isinstance(error, RefusedError):
            self._refusals.labels(event.side, reason).inc()
        if event.side == "server":
            self._connections.dec()
            if transport:
                self._clients.labels(transport).dec()
            return
        self._again.inc(event.unfinished)
        self._digests.inc(isinstance(error, DigestMismatch))
        if error is not None and event.blocks:
            self._failovers.labels(reason).inc()

    def _offered(self, event: ServingStarted) -> None:
        role, layout = _one_of(event.role, _ROLES), _one_of(event.layout, _LAYOUTS)
        with self._lock:
            self._serving[event.role, event.layout, event.root] = event.nbytes
        self._served.labels(role, layout).inc(event.nbytes)

    def _withdrawn(self, event: ServingStopped) -> None:
        role, layout = _one_of(event.role, _ROLES), _one_of(event.layout, _LAYOUTS)
        with self._lock:
            nbytes = self._serving.pop((event.role, event.layout, event.root), 0)
        self._served.labels(role, layout).dec(nbytes)
