"""Metrics of real pulls and servers, as a scrape gives them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from netloader.client.pull import pull_from
from netloader.core.addresses import Address
from netloader.core.messages import RefusalCode
from netloader.core.options import PullOptions
from netloader.core.report import PullReport
from netloader.discovery import FixedSources
from netloader.errors import (
    AttemptFailed,
    ConfigError,
    DigestMismatch,
    NetloaderError,
    NoSourceLeft,
    PeerLost,
    RefusedError,
    RootMismatch,
)
from netloader.observe import BlocksVerified, SessionEnded, TransportChosen
from netloader.observe.metrics import REASONS, Metrics, reason_of
from netloader.tensors import TensorHolding, destination, digest_of
from netloader.transports.base import Transport
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport
from tests.drivers import kit

HUB = kit.Hub()
WEIGHTS = kit.weights()
HOLDING = kit.held(WEIGHTS)
NOBODY = Address("127.0.0.1", 9)


class Scraped:
    """The values of a registry, as text of the exposition format gives them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(generate_latest(registry).decode())
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self._samples.get((f"netloader_{name}", frozenset(labels.items())), 0.0)

    def labels(self) -> Iterator[tuple[str, str]]:
        for _, found in self._samples:
            yield from found


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


async def pull(
    sources: Sequence[Address], metrics: Metrics, over: Transport = HUB.transport, **options: Any
) -> PullReport:
    chosen = PullOptions(**{"timeout": kit.PATIENCE, "timings": kit.CALM, **options})
    filled, found = destination(kit.blank(WEIGHTS)), FixedSources(sources)
    return await pull_from(filled, kit.IDENTITY, found, [over], digest_of, chosen, observers=[metrics])


async def test_both_sides_of_a_pull_count_the_same_bytes(metrics: Metrics) -> None:
    served = Metrics(CollectorRegistry())
    async with kit.serving(HUB.transport, HOLDING, observers=[served]) as server:
        assert Scraped(served.registry)("served_bytes", role="target", layout="raw") == HOLDING.announcement.plan.nbytes
        report = await pull([kit.at(server)], metrics)
        await kit.until(lambda: not server.sessions)
    ours, theirs = Scraped(metrics.registry), Scraped(served.registry)
    assert ours("bytes_total", side="client", transport="memory") == report.nbytes
    assert theirs("bytes_total", side="server", transport="memory") == report.nbytes
    assert ours("blocks_total", side="client", transport="memory") == report.blocks
    assert theirs("blocks_total", side="server", transport="memory") == report.blocks
    assert ours("pulls_total", role="target", outcome="pulled", reason="") == 1
    assert ours("pulls_running", role="target") == 0
    assert ours("pull_seconds_sum", role="target", outcome="pulled") == pytest.approx(report.seconds)
    for phase, seconds in report.phases.as_dict().items():
        assert ours("phase_seconds_sum", side="client", phase=phase) == pytest.approx(seconds)
    assert (
        ours("sources_chosen_total", found_by="provider") == ours("sources_left_total", outcome="used", reason="") == 1
    )
    done = {"transport": "memory", "outcome": "done", "reason": ""}
    assert ours("sessions_total", side="client", **done) == theirs("sessions_total", side="server", **done) == 1
    for gauge in ({"name": "connections"}, {"name": "clients", "transport": "memory"}):
        assert theirs(**gauge) == 0
    assert theirs("served_bytes", role="target", layout="raw") == 0, "the server ended"


async def test_a_client_that_is_being_served_shows(metrics: Metrics) -> None:
    seen: list[tuple[float, float]] = []

    def look(event: object) -> None:
        if isinstance(event, BlocksVerified):
            now = Scraped(metrics.registry)
            seen.append((now("clients", transport="memory"), now("connections")))

    async with kit.serving(HUB.transport, HOLDING, observers=[metrics]) as server:
        filled, found = destination(kit.blank(WEIGHTS)), FixedSources([kit.at(server)])
        chosen = PullOptions(timeout=kit.PATIENCE, timings=kit.CALM)
        await pull_from(filled, kit.IDENTITY, found, [HUB.transport], digest_of, chosen, observers=[look])
    assert seen
    assert set(seen) == {(1.0, 1.0)}


async def test_a_source_that_fails_amid_its_blocks_is_a_failover(metrics: Metrics) -> None:
    tcp = kit.carrier("tcp")
    cut = FaultyTransport(tcp, Faults([Fault(FaultKind.CUT, 25)]))
    async with kit.serving(cut, HOLDING) as first, kit.serving(tcp, HOLDING) as second:
        report = await pull([kit.at(first), kit.at(second)], metrics, tcp, stripe=1)
    found = Scraped(metrics.registry)
    lost = sum(found("failovers_total", reason=reason) for reason in REASONS)
    assert lost == 1
    assert found("blocks_refetched_total") >= 1
    assert found("blocks_total", side="client", transport="tcp") == report.blocks, "each counts once"


async def test_a_corrupted_block_shows_as_such(metrics: Metrics) -> None:
    bad = FaultyTransport(HUB.transport, Faults([Fault(FaultKind.CORRUPT, 3)]))
    async with kit.serving(bad, HOLDING) as server:
        with pytest.raises(NoSourceLeft):
            await pull([kit.at(server)], metrics)
    found = Scraped(metrics.registry)
    assert found("digest_mismatches_total") == 1
    assert found("pulls_total", role="target", outcome="failed", reason="digest") == 1
    assert found("sources_left_total", outcome="failed", reason="digest") == 1


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        (HOLDING, "peer_lost"),
        (kit.held(WEIGHTS, kit.variant(model="another")), "refused_identity"),
        (kit.held(kit.weights(rows=5)), "manifest"),
    ],
    ids=["nobody", "another model", "other tensors"],
)
async def test_why_a_pull_failed_shows_by_reason(metrics: Metrics, held: TensorHolding, reason: str) -> None:
    theirs = Metrics(CollectorRegistry())
    async with kit.serving(HUB.transport, held, observers=[theirs]) as server:
        with pytest.raises(NoSourceLeft):
            await pull([NOBODY if reason == "peer_lost" else kit.at(server)], metrics)
    ours, other = Scraped(metrics.registry), Scraped(theirs.registry)
    assert ours("pulls_total", role="target", outcome="failed", reason=reason) == 1
    if reason == "refused_identity":
        assert ours("sources_left_total", outcome="refused", reason=reason) == 1
        assert ours("refusals_total", side="client", reason=reason) == 1
        assert other("refusals_total", side="server", reason=reason) == 1


def test_every_error_has_a_reason_of_the_list() -> None:
    def kinds(kind: type[NetloaderError]) -> Iterator[type[NetloaderError]]:
        yield kind
        for one in kind.__subclasses__():
            yield from kinds(one)

    for kind in kinds(NetloaderError):
        if not issubclass(kind, RefusedError | NoSourceLeft):
            assert reason_of(kind.__new__(kind)) in REASONS
    for code in get_args(RefusalCode):
        assert reason_of(RefusedError(code, "no")) == f"refused_{code.replace('-', '_')}"
    assert reason_of(RefusedError("made up by a peer", "no")) == "other"
    assert reason_of(RuntimeError()) == "other"
    same = [AttemptFailed("a:1", PeerLost("gone")), AttemptFailed("b:1", PeerLost("gone too"))]
    assert reason_of(NoSourceLeft(same)) == "peer_lost"
    assert reason_of(NoSourceLeft([*same, AttemptFailed("c:1", RootMismatch("a", "b", "c"))])) == "no_source"
    assert reason_of(NoSourceLeft([])) == "no_source"
    assert reason_of(DigestMismatch(1, ["a"], "b", "c")) == "digest"


def test_labels_are_never_what_a_peer_chose(metrics: Metrics) -> None:
    strange = "\x1b[31m" + "x" * 500
    metrics(TransportChosen("server", 1, strange, strange))
    error = RefusedError(strange, strange)
    metrics(SessionEnded("server", 1, strange, strange, strange, 1.0, 1, 1, error))
    assert not [value for _, value in Scraped(metrics.registry).labels() if "x" * 5 in value]


def test_a_registry_takes_the_metrics_once(metrics: Metrics) -> None:
    with pytest.raises(ConfigError, match=r"registry = .CollectorRegistry. is not valid") as raised:
        Metrics(metrics.registry)
    assert "give it to all pulls and servers" in raised.value.hint


def test_without_the_library_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from netloader.observe.metrics import Metrics\n"
        "from netloader.errors import ConfigError\n"
        "try: Metrics()\n"
        "except ConfigError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "pip install 'netloader[metrics]'" in run.stdout


DOCS = (Path(__file__).parents[1] / "docs/metrics.md").read_text(encoding="utf-8")


def test_the_table_of_the_documentation_is_that_of_the_code(metrics: Metrics) -> None:
    described = {
        (name, kind, tuple(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in re.findall(r"^\| `(netloader_\w+)` \| (\w+) \|([^|]*)\|", DOCS, re.MULTILINE)
    }
    found = set()
    for one in vars(metrics).values():
        if isinstance(one, MetricWrapperBase):
            name = one._name + ("_total" if one._type == "counter" else "")
            found.add((name, one._type, one._labelnames))
    assert described == found | {("netloader_build_info", "gauge", ("version",))}


def test_every_reason_is_documented() -> None:
    described = set(re.findall(r"^\| `(\w+)` \| [a-z]", DOCS.partition("| reason |")[2], re.MULTILINE))
    assert described == {reason for reason in REASONS if reason and not reason.startswith("refused_")}
