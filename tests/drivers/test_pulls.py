"""Pulls that succeed: one, several at once, in turns, into new memory, from code without an event loop."""

from __future__ import annotations

import asyncio
import itertools
import logging

import anyio
import pytest
import torch

import netloader
from netloader.client.pull import pull_from
from netloader.core import pull_events as p
from netloader.core.addresses import Address
from netloader.core.identity import differences
from netloader.core.manifest import Manifest
from netloader.core.options import PullOptions
from netloader.core.protocol import State
from netloader.core.pull import Pull
from netloader.core.report import Progress, PullReport
from netloader.discovery import FixedSources
from netloader.errors import ConfigError, LocalProtocolError, NetloaderError, NoSourceLeft, RefusedError
from netloader.observe import Event, SourceChosen
from netloader.tensors import destination, digest_of
from netloader.tensors.destination import Destination
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport
from tests.drivers import kit


@pytest.mark.usefixtures("no_leaked_descriptors")
async def test_a_pull_is_bit_exact_and_its_report_adds_up() -> None:
    hub, source = kit.Hub(), kit.weights()
    holding = kit.held(source)
    into, steps = kit.blank(source), list[Progress]()
    async with kit.serving(hub.transport, holding) as server:
        report = await kit.pull(into, [kit.at(server)], hub.transport, progress=steps.append)

    assert kit.contents(into) == kit.contents(source)
    plan = holding.announcement.plan
    assert report.root == holding.announcement.root
    assert (report.nbytes, report.blocks, report.tensors) == (plan.nbytes, len(plan.blocks), len(source))
    assert report.identity == kit.IDENTITY
    assert (report.retries, report.attempts) == (0, ())
    assert list(report.sources) == [str(kit.at(server))]
    share = report.sources[str(kit.at(server))]
    assert (share.blocks, share.nbytes, share.transport) == (report.blocks, report.nbytes, "memory")
    spent = report.phases.as_dict()
    verify = spent.pop("verify")
    assert 0 < verify <= spent["transfer"]
    assert 0 < sum(spent.values()) <= report.seconds

    verified = [step.verified for step in steps]
    assert verified == sorted(verified)
    assert verified[-1] == plan.nbytes
    assert {step.total for step in steps} == {plan.nbytes}
    assert {step.source for step in steps} == {str(kit.at(server))}
    assert [step.seconds for step in steps] == sorted(step.seconds for step in steps)


async def test_empty_tensors_are_pulled() -> None:
    hub = kit.Hub()
    source = {"empty": torch.empty(0, 3), "none": torch.empty(2, 0, dtype=torch.int8)}
    async with kit.serving(hub.transport, kit.held(source)) as server:
        report = await kit.pull(kit.blank(source), [kit.at(server)], hub.transport)
    assert (report.nbytes, report.blocks, report.tensors) == (0, 0, 2)
    assert len(report.root) == 64


async def test_a_pull_without_any_tensor_completes() -> None:
    hub = kit.Hub()
    async with kit.serving(hub.transport, kit.held({})) as server:
        report = await kit.pull({}, [kit.at(server)], hub.transport)
    assert (report.nbytes, report.blocks, report.tensors) == (0, 0, 0)


async def test_two_pulls_in_one_process_run_at_the_same_time() -> None:
    hub, source = kit.Hub(4096), kit.weights()
    first, second = kit.blank(source), kit.blank(source)
    async with kit.serving(hub.transport, kit.held(source)) as server, anyio.create_task_group() as tasks:
        tasks.start_soon(kit.pull, first, [kit.at(server)], hub.transport)
        tasks.start_soon(kit.pull, second, [kit.at(server)], hub.transport)
    assert kit.contents(first) == kit.contents(second) == kit.contents(source)


async def test_the_public_api_pulls_into_new_memory_and_keeps_tied_tensors_tied() -> None:
    hub, source = kit.Hub(), kit.weights()
    async with netloader.Server(source, kit.IDENTITY, host="127.0.0.1", transport=hub.transport) as server:
        address = Address("127.0.0.1", server.port)
        assert server.address == address
        into = kit.blank(source)
        steps = list[Progress]()
        await netloader.pull(into, kit.IDENTITY, sources=[str(address)], transport=hub.transport)
        new, report = await netloader.pull_new(sources=[address], transport=hub.transport, progress=steps.append)
        look = await netloader.probe(address)
    assert kit.contents(into) == kit.contents(new) == kit.contents(source)
    assert new["tied"] is new["half"]
    assert report.identity == look.announcement.identity == kit.IDENTITY
    assert report.root == look.announcement.root
    assert look.software.startswith("netloader ")


@pytest.mark.usefixtures("no_leaked_descriptors")
def test_the_synchronous_api_pulls_and_probes() -> None:
    hub, source = kit.Hub(), kit.weights()
    with netloader.sync.serve(source, kit.IDENTITY, host="127.0.0.1", transport=hub.transport) as server:
        into = kit.blank(source)
        report = netloader.sync.pull(into, kit.IDENTITY, sources=[server.address], transport=hub.transport)
        new, again = netloader.sync.pull_new(sources=[server.address], transport=hub.transport)
        look = netloader.sync.probe(server.address)
        with pytest.raises(NoSourceLeft, match="kit"):
            netloader.sync.pull(into, kit.variant(model="other"), sources=[server.address], transport=hub.transport)
        server.retract(reason="tea time")
        with pytest.raises(RefusedError, match="tea time"):
            netloader.sync.probe(server.address)
        assert server.hold(source, kit.IDENTITY) == report.root
        assert server.port == int(server.address.rsplit(":", 1)[1])
    assert kit.contents(into) == kit.contents(new) == kit.contents(source)
    assert report.root == again.root == look.announcement.root


@pytest.mark.usefixtures("turns_stay")
async def test_twelve_clients_share_three_turns_in_order_of_arrival(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "netloader")
    source = kit.weights()
    faults = Faults([Fault(FaultKind.HOLD, 3, times=None)])  # of each client
    hub = kit.Hub()
    harmed = FaultyTransport(hub.transport, faults)
    came, done = list[str](), list[int]()
    reports: dict[int, PullReport] = {}
    blanks = [kit.blank(source) for _ in range(12)]
    most = 0

    async with kit.serving(harmed, kit.held(source), max_clients=3) as server, anyio.create_task_group() as tasks:

        def watch(_: Progress) -> None:
            nonlocal most
            most = max(most, sum(s.state in (State.PLAN, State.TRANSFER) for s in server.sessions))

        def placed(clients: int) -> bool:
            found = [s for s in server.sessions if s.state in (State.VALIDATE, State.TRANSFER) and s.role]
            return len(found) == clients == len(server.sessions)

        async def one(number: int) -> None:
            reports[number] = await kit.pull(blanks[number], [kit.at(server)], hub.transport, progress=watch)
            done.append(number)

        for number in range(12):
            tasks.start_soon(one, number)
            await kit.until(lambda: len(server.sessions) == number + 1, "connected")  # noqa: B023
            await kit.until(lambda: placed(number + 1), "placed")  # noqa: B023
            came.append(next(s.peer for s in server.sessions if s.peer not in came))
        assert sum(s.state is State.TRANSFER for s in server.sessions) == 3
        assert sum(s.state is State.VALIDATE for s in server.sessions) == 9
        assert "waiting for a turn: all 3 turns are taken" in caplog.text
        faults.release()

    served = [record.getMessage() for record in caplog.records if "TRANSFER over" in record.getMessage()]
    assert [line.split(" with ")[1].split(": ")[0] for line in served] == came
    assert most == 3
    assert sorted(done) == list(range(12))
    assert all(kit.contents(into) == kit.contents(source) for into in blanks)
    assert {report.retries for report in reports.values()} == {0}


@pytest.mark.usefixtures("turns_stay")
async def test_a_full_queue_refuses_with_busy_and_a_retry_time(caplog: pytest.LogCaptureFixture) -> None:
    source = kit.weights()
    faults = Faults([Fault(FaultKind.HOLD, 3)])
    hub = kit.Hub()
    harmed = FaultyTransport(hub.transport, faults)
    first, second = kit.blank(source), kit.blank(source)
    async with (
        kit.serving(harmed, kit.held(source), max_clients=1, max_queue=1) as server,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(kit.pull, first, [kit.at(server)], hub.transport)
        await kit.until(lambda: [s.state for s in server.sessions] == [State.TRANSFER])
        tasks.start_soon(kit.pull, second, [kit.at(server)], hub.transport)
        await kit.until(lambda: [s.role for s in server.sessions] == ["target", "target"])
        with pytest.raises(NoSourceLeft, match="1 clients are being served and 1 wait") as caught:
            await kit.pull(kit.blank(source), [kit.at(server)], hub.transport)
        cause = caught.value.attempts[0].cause
        assert isinstance(cause, RefusedError)
        assert (cause.code, cause.retry_after) == ("busy", 5.0)
        assert "MAX_CLIENTS" in caught.value.hint
        told = [record.getMessage() for record in caplog.records if record.module == "pull"]
        assert f"source {kit.at(server)}: 1 clients are being served and 1 wait" in told[-1]
        # A probe is answered at once.
        look = await netloader.probe(kit.at(server))
        assert look.announcement.identity == kit.IDENTITY
        faults.release()
    assert kit.contents(first) == kit.contents(second) == kit.contents(source)


@pytest.mark.usefixtures("no_leaked_descriptors")
async def test_a_client_with_wait_finds_a_server_that_starts_later() -> None:
    hub, source = kit.Hub(), kit.weights()
    into = kit.blank(source)
    async with kit.serving(hub.transport) as gone:
        address = kit.at(gone)
    reports = list[PullReport]()

    async def wait() -> None:
        reports.append(await kit.pull(into, [address], hub.transport, wait=kit.PATIENCE))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        async with kit.serving(hub.transport, port=address.port) as server:
            server.expect("target", "raw", reason="the engine is still loading", retry_after=0.05)
            await kit.until(lambda: server.ended)
            server.add(kit.held(source))
            await kit.until(lambda: reports)
    assert kit.contents(into) == kit.contents(source)
    (report,) = reports
    told = [attempt.message for attempt in report.attempts]
    assert any("cannot be reached" in text for text in told)
    assert any("still loading" in text for text in told)
    assert len(told) == 2
    assert report.retries >= 2


async def test_a_client_without_wait_fails_with_not_ready() -> None:
    hub, source = kit.Hub(), kit.weights()
    async with kit.serving(hub.transport) as server:
        server.expect("target", "raw", reason="the engine is still loading")
        with pytest.raises(NoSourceLeft, match="still loading") as caught:
            await kit.pull(kit.blank(source), [kit.at(server)], hub.transport)
    assert "WAIT" in caught.value.hint


async def test_a_pull_ends_within_its_timeout_whatever_it_waits_for() -> None:
    hub, source = kit.Hub(), kit.weights()
    async with kit.serving(hub.transport) as server:
        server.expect("target", "raw", reason="the engine is still loading", retry_after=kit.PATIENCE)
        with pytest.raises(NoSourceLeft, match=r"did not end within 1 s.*TIMEOUT") as caught:
            await kit.pull(kit.blank(source), [kit.at(server)], hub.transport, wait=10 * kit.PATIENCE, timeout=1.0)
    assert len(caught.value.attempts) == 2


async def test_target_and_draft_share_a_port() -> None:
    hub = kit.Hub()
    target, draft = kit.weights(1), kit.weights(2)
    draft_identity = kit.variant(model="draft", role="draft")
    async with kit.serving(hub.transport, kit.held(target), kit.held(draft, draft_identity)) as server:
        for source, identity in ((target, kit.IDENTITY), (draft, draft_identity)):
            into = kit.blank(source)
            report = await kit.pull(into, [kit.at(server)], hub.transport, identity=identity)
            assert kit.contents(into) == kit.contents(source)
            assert report.identity == identity
        adopted = await kit.pull(kit.blank(draft), [kit.at(server)], hub.transport, identity=None, role="draft")
        assert adopted.identity == draft_identity
        with pytest.raises(NoSourceLeft, match="model is 'draft' at the server and 'kit' at the client"):
            await kit.pull(kit.blank(target), [kit.at(server)], hub.transport, identity=kit.variant(role="draft"))


async def test_a_probe_reports_differences_and_is_not_refused() -> None:
    hub, source = kit.Hub(), kit.weights()
    asked = kit.variant(model="other", dtype="torch.float64")
    async with kit.serving(hub.transport, kit.held(source)) as server:
        look = await netloader.probe(kit.at(server), asked)
        with pytest.raises(RefusedError, match="nothing is held for draft"):
            await netloader.probe(kit.at(server), role="draft")
    assert [d.field for d in differences(look.announcement.identity, asked)] == ["model", "dtype"]
    assert look.announcement.manifest == kit.held(source).announcement.manifest
    assert look.software == "test"


async def test_an_error_of_the_progress_callback_is_raised_to_the_caller() -> None:
    hub, source = kit.Hub(), kit.weights()

    class CallbackError(Exception):
        pass

    def fail(_: Progress) -> None:
        raise CallbackError("the bar broke")

    async with kit.serving(hub.transport, kit.held(source)) as server:
        with pytest.raises(CallbackError, match="the bar broke"):
            await kit.pull(kit.blank(source), [kit.at(server)], hub.transport, progress=fail)
        await kit.until(lambda: server.sessions == ())


@pytest.mark.parametrize(
    ("sources", "field"), [(["no port"], "sources[0]"), (["h:1", "h:70000"], "sources[1]"), ("h:1", "sources")]
)
async def test_invalid_source_addresses_are_errors_that_name_the_source(sources: list[str], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        await netloader.pull({}, sources=sources)
    assert caught.value.field == field


async def test_a_pull_without_sources_is_an_error() -> None:
    with pytest.raises(NoSourceLeft, match="no source was given"):
        await kit.pull(kit.weights(), [], kit.Hub().transport)


@pytest.mark.parametrize("hold_at", [0, 20])
async def test_the_information_about_a_session_counts_the_blocks_sent_so_far(hold_at: int) -> None:
    source = kit.weights()
    faults = Faults([Fault(FaultKind.HOLD, hold_at)])
    hub = kit.Hub()
    into = kit.blank(source)
    async with (
        kit.serving(FaultyTransport(hub.transport, faults), kit.held(source)) as server,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(kit.pull, into, [kit.at(server)], hub.transport)
        await kit.until(lambda: faults.fired)
        await kit.until(lambda: memory_prefix(into) == memory_prefix(source, hold_at + 1), "what was sent landed")
        (info,) = server.sessions
        assert (info.state, info.role, info.transport) == (State.TRANSFER, "target", "memory")
        assert info.nbytes == info.blocks * kit.BLOCK
        assert info.blocks <= hold_at + 1
        faults.release()
    assert kit.contents(into) == kit.contents(source)


def memory_prefix(tensors: kit.Tensors, blocks: int | None = None) -> bytes:
    """The blocks of "large" that are not blank; or its first `blocks` blocks."""
    rows = kit.contents(tensors)["large"]
    cut = [rows[i : i + kit.BLOCK] for i in range(0, len(rows), kit.BLOCK)]
    if blocks is None:
        return b"".join(itertools.takewhile(lambda row: row != b"\x5a" * kit.BLOCK, cut))
    return b"".join(cut[:blocks])


async def test_an_unexpected_error_while_memory_is_allocated_is_raised_as_no_source_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def adopt(destination: Destination, manifest: Manifest, metadata: object) -> None:
        raise ZeroDivisionError(f"{destination.device}, {len(manifest.tensors)}")

    monkeypatch.setattr(Destination, "adopt", adopt)
    hub, source = kit.Hub(), kit.weights(rows=3)
    async with kit.serving(hub.transport, kit.held(source)) as server:
        with pytest.raises(NoSourceLeft, match=f"unexpected ZeroDivisionError: cpu, {len(source)}"):
            await kit.pull(None, [kit.at(server)], hub.transport)


async def test_a_transport_whose_facts_raise_fails_the_source_and_leaves_no_connection_open() -> None:
    class Broken(FaultyTransport):
        def facts(self, device: str) -> dict[str, str]:
            raise ZeroDivisionError(device)

    hub, source = kit.Hub(), kit.weights(rows=3)
    async with kit.serving(hub.transport, kit.held(source)) as server:
        with pytest.raises(NoSourceLeft, match="unexpected ZeroDivisionError: cpu"):
            await kit.pull(kit.blank(source), [kit.at(server)], Broken(hub.transport, Faults([])))
        await kit.until(lambda: server.sessions == ())


async def test_a_pull_whose_tasks_were_cancelled_by_others_never_returns_a_report() -> None:
    def cancels(event: Event) -> None:
        if isinstance(event, SourceChosen):
            raise asyncio.CancelledError

    hub, source = kit.Hub(), kit.weights(rows=3)
    async with kit.serving(hub.transport, kit.held(source)) as server:
        filled, sources = destination(kit.blank(source)), FixedSources([kit.at(server)])
        with pytest.raises(NetloaderError, match="ended before every block was verified"):
            await pull_from(
                filled, kit.IDENTITY, sources, [hub.transport], digest_of, PullOptions(), observers=[cancels]
            )


async def test_an_unexpected_error_while_landed_blocks_are_counted_ends_a_session_that_is_receiving(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There a timer of the event loop counts, and no task waits for it."""
    hub, held, handle = kit.Hub(), Faults([Fault(FaultKind.HOLD, 20)]), Pull.handle

    broken = 0

    def broken_once(core: Pull, event: p.Event, now: float) -> list[p.Command]:
        nonlocal broken
        if isinstance(event, p.BlocksArrived) and not broken:
            broken += 1
            held.release()
            raise LocalProtocolError("it lost count")
        return handle(core, event, now)

    monkeypatch.setattr(Pull, "handle", broken_once)
    source = kit.weights()
    async with kit.serving(FaultyTransport(hub.transport, held), kit.held(source)) as server:
        with anyio.fail_after(kit.PATIENCE / 2), pytest.raises(NoSourceLeft, match="it lost count"):
            await kit.pull(kit.blank(source), [kit.at(server)], hub.transport)
