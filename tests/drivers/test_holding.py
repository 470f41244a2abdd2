"""Holdings that change while clients connect: retracted, held again, expected later."""

from __future__ import annotations

import anyio
import pytest
from torch.multiprocessing.reductions import StorageWeakRef

import netloader
from netloader.core.protocol import State
from netloader.core.report import PullReport
from netloader.errors import LocalProtocolError, NoSourceLeft, RefusedError
from netloader.server import session as server_session
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport
from tests.drivers import kit

SOURCE = kit.weights()
BLOCKS = len(kit.held(SOURCE).announcement.plan.blocks)


async def refused(server: kit.WatchedServer, hub: kit.Hub) -> RefusedError:
    with pytest.raises(NoSourceLeft) as caught:
        await kit.pull(kit.blank(SOURCE), [kit.at(server)], hub.transport)
    (attempt,) = caught.value.attempts
    assert isinstance(attempt.cause, RefusedError)
    assert attempt.hint
    return attempt.cause


async def test_a_retracted_holding_is_refused_until_it_is_held_again() -> None:
    hub, holding = kit.Hub(), kit.held(SOURCE)
    async with kit.serving(hub.transport, holding) as server:
        await server.retract("target", reason="the engine sleeps")
        error = await refused(server, hub)
        assert (error.code, error.message) == ("gone", "the engine sleeps")
        assert error.retry_after is not None
        server.add(holding)
        into = kit.blank(SOURCE)
        await kit.pull(into, [kit.at(server)], hub.transport)
        assert kit.contents(into) == kit.contents(SOURCE)
        with pytest.raises(LocalProtocolError, match="already served"):
            server.add(holding)


async def test_a_new_holding_replaces_the_state_of_the_previous_one() -> None:
    hub, holding = kit.Hub(), kit.held(SOURCE)
    async with kit.serving(hub.transport, holding) as server:
        await server.retract("target", reason="it is loaded anew")
        server.expect("target", "raw", reason="still loading", retry_after=1.0)
        assert (await refused(server, hub)).code == "not-ready"
        server.holdings.refuse("target", "raw", "it was rewritten", "set KEEP_RAW")
        assert (await refused(server, hub)).code == "not-held"
        server.expect("target", "raw", reason="still loading", retry_after=1.0)
        assert (await refused(server, hub)).code == "not-ready"
        server.add(holding)
        server.expect("target", "raw", reason="still loading", retry_after=1.0)
        into = kit.blank(SOURCE)
        await kit.pull(into, [kit.at(server)], hub.transport)
        assert kit.contents(into) == kit.contents(SOURCE), "a served holding stays served"


@pytest.mark.usefixtures("turns_stay")
async def test_retracting_cuts_a_running_send_and_frees_its_memory() -> None:
    hub = kit.Hub()
    source = kit.weights()
    watch = StorageWeakRef(source["large"].untyped_storage())  # type: ignore[no-untyped-call]
    faults = Faults([Fault(FaultKind.HOLD, 3)])
    outcomes: list[NoSourceLeft] = []
    async with (
        kit.serving(FaultyTransport(hub.transport, faults), kit.held_weakly(source), max_clients=1) as server,
        anyio.create_task_group() as tasks,
    ):

        async def client() -> None:
            with pytest.raises(NoSourceLeft) as caught:
                await kit.pull(kit.blank(SOURCE), [kit.at(server)], hub.transport)
            outcomes.append(caught.value)

        tasks.start_soon(client)
        await kit.until(lambda: faults.fired, "one is in the middle of a transfer")
        tasks.start_soon(client)
        await kit.until(lambda: server._turns.waiting == 1, "one is in the queue")
        await server.retract("target", reason="new weights", within=0.1)
        assert server.sessions == ()
        source.clear()
        assert watch.expired()  # type: ignore[no-untyped-call]
    assert [error.attempts[0].cause.message for error in outcomes] == ["new weights"] * 2
    assert {
        error.attempts[0].cause.code for error in outcomes if isinstance(error.attempts[0].cause, RefusedError)
    } == {"gone"}


async def test_retracting_does_not_cut_a_send_that_ends_in_time() -> None:
    hub, into = kit.Hub(), kit.blank(SOURCE)
    faults = Faults([Fault(FaultKind.HOLD, 3)])
    async with (
        kit.serving(FaultyTransport(hub.transport, faults), kit.held(SOURCE)) as server,
        anyio.create_task_group() as tasks,
    ):

        async def client() -> None:
            await kit.pull(into, [kit.at(server)], hub.transport)

        async def retract() -> None:
            await server.retract("target", reason="new weights", within=kit.PATIENCE)
            assert server.sessions == ()

        tasks.start_soon(client)
        await kit.until(lambda: faults.fired)
        tasks.start_soon(retract)
        await kit.until(lambda: server.holdings.held() == ())
        assert [s.state for s in server.sessions] == [State.TRANSFER]
        faults.release()
    assert kit.contents(into) == kit.contents(SOURCE)


async def test_retracting_one_role_leaves_the_other_one_served() -> None:
    hub = kit.Hub()
    draft = kit.weights(seed=5)
    draft_identity = kit.variant(role="draft")
    faults = Faults([Fault(FaultKind.HOLD, 3)])
    into = kit.blank(draft)
    async with (
        kit.serving(
            FaultyTransport(hub.transport, faults), kit.held(SOURCE), kit.held(draft, draft_identity)
        ) as server,
        anyio.create_task_group() as tasks,
    ):

        async def client() -> None:
            await kit.pull(into, [kit.at(server)], hub.transport, identity=draft_identity)

        tasks.start_soon(client)
        await kit.until(lambda: faults.fired)
        await server.retract("target", reason="only the target")
        assert [s.role for s in server.sessions] == ["draft"]
        faults.release()
    assert kit.contents(into) == kit.contents(draft)


async def test_a_queued_client_survives_a_retraction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_session, "_RETRY_GONE", 0.05)
    hub, holding, into = kit.Hub(), kit.held(SOURCE), kit.blank(SOURCE)
    faults = Faults([Fault(FaultKind.HOLD, 3)])
    reports: list[PullReport] = []
    async with (
        kit.serving(FaultyTransport(hub.transport, faults), holding) as server,
        anyio.create_task_group() as tasks,
    ):

        async def client() -> None:
            reports.append(await kit.pull(into, [kit.at(server)], hub.transport, wait=kit.PATIENCE))

        tasks.start_soon(client)
        await kit.until(lambda: faults.fired)
        await server.retract("target", reason="for a moment", within=0.0)
        server.add(holding)
        faults.release()
    assert kit.contents(into) == kit.contents(SOURCE)
    assert [attempt.cause.message for attempt in reports[0].attempts] == ["for a moment"]


async def test_a_role_that_was_never_held_is_refused_by_name() -> None:
    hub = kit.Hub()
    async with kit.serving(hub.transport, kit.held(SOURCE)) as server:
        with pytest.raises(NoSourceLeft, match="nothing is held for draft in raw; held: target in layout raw"):
            await kit.pull(kit.blank(SOURCE), [kit.at(server)], hub.transport, identity=kit.variant(role="draft"))
        with pytest.raises(NoSourceLeft, match="target in checkpoint"):
            await kit.pull(
                kit.blank(SOURCE), [kit.at(server)], hub.transport, identity=kit.variant(layout="checkpoint")
            )


async def test_weights_that_change_while_they_are_served_are_detected_by_the_client() -> None:
    hub = kit.Hub()
    source = kit.weights()
    async with kit.serving(hub.transport, kit.held(source)) as server:
        source["large"][7, 3] ^= 1
        with pytest.raises(NoSourceLeft, match=r"block 7 \(large\) arrived with digest"):
            await kit.pull(kit.blank(source), [kit.at(server)], hub.transport)


async def test_a_server_cannot_be_entered_twice() -> None:
    server = netloader.Server(SOURCE, kit.IDENTITY, host="127.0.0.1", transport=kit.Hub().transport)
    async with server:
        with pytest.raises(LocalProtocolError, match="before"):
            await server.__aenter__()
    with pytest.raises(LocalProtocolError, match="before"):
        await server.__aenter__()
    with pytest.raises(LocalProtocolError, match="not running"):
        await server.__aexit__(None, None, None)
