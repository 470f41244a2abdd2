"""What a client logs when a pull is refused: one deliberately broken case for each line in docs/refusals.md.

Whichever side refuses, the line is in the log of the client, where the operator looks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch

from netloader.core import messages as m
from netloader.core.identity import ModelIdentity
from netloader.errors import NoSourceLeft
from netloader.tensors.holding import TensorHolding
from netloader.transports import registry
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport
from tests.core.test_identity import BASE, NOT_COMPARED, OTHER
from tests.core.test_identity import changed as identity_with
from tests.drivers import kit

SOURCE = kit.weights()
HOLDING = kit.held(SOURCE)
TOKEN = b"a secret of many bytes"

Refused = Callable[..., Awaitable[str]]


@pytest.fixture
def refused(caplog: pytest.LogCaptureFixture) -> Refused:
    """Pull from one source, which has to fail; return the line that the client logs about it."""
    caplog.set_level(logging.INFO, logger="netloader")

    async def pull(address: Any, hub: kit.Hub, like: kit.Tensors | None = SOURCE, **options: Any) -> str:
        caplog.clear()
        into = None if like is None else kit.blank(like)
        with pytest.raises(NoSourceLeft) as caught:
            await kit.pull(into, [address], hub.transport, **options)
        if into is not None and like is not None and caught.value.total is None:
            assert kit.contents(into) == kit.contents(kit.blank(like)), "not one byte was written"
        told = [r for r in caplog.records if r.module == "pull" and r.levelno >= logging.WARNING]
        lines = [record.getMessage() for record in told]
        found = [line for line in lines if line.startswith(f"source {address}: ")]
        assert len(found) == 1, caplog.text
        return found[0]

    return pull


# --- identity -------------------------------------------------------------------------------------------------------

FIELDS = [field for field in OTHER if field not in NOT_COMPARED | {"role", "layout"}]


def pair_for(field: str) -> tuple[ModelIdentity, ModelIdentity]:
    """Identities of a server and a client that differ in one field."""
    base = identity_with(layout="processed") if field == "engine" else BASE
    return identity_with(base, **{field: OTHER[field]}), base


@pytest.mark.parametrize("field", FIELDS)
async def test_an_identity_that_differs_in_one_field_is_refused_with_both_values(field: str, refused: Refused) -> None:
    hub, (theirs, ours) = kit.Hub(), pair_for(field)
    async with kit.serving(hub.transport, kit.held(SOURCE, theirs)) as server:
        line = await refused(kit.at(server), hub, identity=ours)
    values = f"{str(getattr(theirs, field))!r} at the server and {str(getattr(ours, field))!r} at the client"
    assert f"the identities differ: {field} is {values} (" in line


@pytest.mark.parametrize("field", FIELDS)
async def test_a_client_compares_identities_itself_when_the_server_does_not(field: str, refused: Refused) -> None:
    """A server may run another release, or be faulty."""
    hub, (theirs, ours) = kit.Hub(), pair_for(field)

    async def script(wire: kit.Wire[m.ClientMessage]) -> None:
        await wire.hear_until(m.Hello)
        await wire.say(kit.welcome(hub.transport))
        await wire.hear_until(m.Identify)
        await wire.say(m.Accepted(identity=theirs))
        await wire.closed()

    async with kit.fake_server(script) as fake:
        line = await refused(fake.address, hub, identity=ours)
    values = f"{str(getattr(ours, field))!r} at the client and {str(getattr(theirs, field))!r} at the server"
    assert f"the identities differ: {field} is {values} (" in line


@pytest.mark.parametrize(
    ("held", "asked", "reason"),
    [
        (
            {},
            {"role": "draft"},
            "nothing is held for draft in raw; held: target in layout raw (start both sides alike)",
        ),
        ({"role": "draft"}, {}, "nothing is held for target in raw; held: draft in layout raw"),
        ({}, {"layout": "processed"}, "nothing is held for target in processed; held: target in layout raw"),
        (
            {"layout": "checkpoint"},
            {},
            "held: target in layout checkpoint (a checkpoint server feeds `netloader pull`; an engine needs a source",
        ),
    ],
)
async def test_a_role_or_layout_that_is_not_held_is_refused(
    held: dict[str, Any], asked: dict[str, Any], reason: str, refused: Refused
) -> None:
    hub = kit.Hub()
    async with kit.serving(hub.transport, kit.held(SOURCE, kit.variant(**held))) as server:
        assert reason in await refused(kit.at(server), hub, identity=kit.variant(**asked))


# --- tensors --------------------------------------------------------------------------------------------------------


def _tensors(**changed: torch.Tensor | None) -> kit.Tensors:
    made: dict[str, torch.Tensor | None] = {
        "a": torch.zeros(4, 6),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "tied": torch.zeros(8),
    }
    made["also tied"] = made["tied"]
    return {name: tensor for name, tensor in {**made, **changed}.items() if tensor is not None}


TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "one is missing": ({"b": None}, "b: the server does not hold it"),
    "one too many": ({"c": torch.zeros(1)}, "c: it is not expected here"),
    "another dtype": ({"b": torch.ones(3, dtype=torch.float16)}, "b: dtype is 'bfloat16' here and 'float16'"),
    "another shape": ({"a": torch.zeros(6, 4)}, "a: shape is (4, 6) here and (6, 4) at the server"),
    "another order": (
        {"a": torch.zeros(6, 4).t()},
        "a: in memory it is in row-major order here and in the order of strides (1, 4) at the server",
    ),
    "tied here only": ({"also tied": torch.zeros(8)}, "also tied: "),
}


@pytest.mark.parametrize("case", TENSORS)
async def test_tensors_that_differ_are_refused_by_name(case: str, refused: Refused) -> None:
    hub, (changed, reason) = kit.Hub(), TENSORS[case]
    async with kit.serving(hub.transport, kit.held(_tensors(**changed))) as server:
        line = await refused(kit.at(server), hub, _tensors())
    assert "1 tensor differs from what the server holds; " in line
    assert reason in line
    assert "both sides have to build the model alike" in line


async def test_a_model_larger_than_the_limit_is_refused(refused: Refused) -> None:
    hub = kit.Hub()
    async with kit.serving(hub.transport, HOLDING) as server:
        line = await refused(kit.at(server), hub, None, max_bytes=1000)
    assert f"the server holds {HOLDING.announcement.plan.nbytes} bytes, this client takes at most 1000" in line


# --- weights --------------------------------------------------------------------------------------------------------


async def test_a_root_other_than_the_expected_one_is_refused(refused: Refused) -> None:
    hub, root = kit.Hub(), "ab" * 32
    async with kit.serving(hub.transport, HOLDING) as server:
        line = await refused(kit.at(server), hub, expect_root=root)
    assert f"this server holds root {HOLDING.announcement.root}, the client is pinned to root {root}" in line


async def test_a_client_compares_the_expected_root_itself_when_the_server_does_not(
    refused: Refused,
) -> None:
    hub, root = kit.Hub(), "ab" * 32

    async def script(wire: kit.Wire[m.ClientMessage]) -> None:
        await wire.hear_until(m.Hello)
        await wire.say(kit.welcome(hub.transport))
        await wire.hear_until(m.Identify)
        await wire.say(m.Accepted(identity=kit.IDENTITY), kit.announce(HOLDING))
        await wire.closed()

    async with kit.fake_server(script) as fake:
        line = await refused(fake.address, hub, expect_root=root)
    held = HOLDING.announcement.root
    assert f"the source holds root {held}, but this pull is pinned to root {root} (by EXPECT_ROOT)" in line


async def test_a_corrupted_block_is_an_error_that_names_block_and_tensor(refused: Refused) -> None:
    hub = kit.Hub()
    harmed = FaultyTransport(hub.transport, Faults([Fault(FaultKind.CORRUPT, 3, times=None)]))
    async with kit.serving(harmed, HOLDING) as server:
        line = await refused(kit.at(server), hub)
    assert "block 3 (large) arrived with digest " in line
    assert ", announced was " in line


# --- tokens, versions, transports -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server_knows", "client_knows", "reason"),
    [
        (TOKEN, None, "this server has a token, and the client has none"),
        (None, TOKEN, "the server has no token, and this client has one"),
        (TOKEN, b"another secret of many bytes", "the server could not prove that it knows the token"),
    ],
    ids=["client has none", "server has none", "they differ"],
)
async def test_a_token_that_one_side_lacks_or_that_differs_is_refused(
    server_knows: bytes | None, client_knows: bytes | None, reason: str, refused: Refused
) -> None:
    hub = kit.Hub()
    async with kit.serving(hub.transport, HOLDING, token=server_knows) as server:
        line = await refused(kit.at(server), hub, token=client_knows)
    assert f"{reason} (configure the same token on both sides)" in line


async def test_a_server_that_speaks_another_protocol_version_is_refused(refused: Refused) -> None:
    hub = kit.Hub()

    async def script(wire: kit.Wire[m.ClientMessage]) -> None:
        await wire.hear_until(m.Hello)
        await wire.say(m.Welcome(protocol=3, nonce=kit.NONCE, abilities=kit.abilities(hub.transport)))
        await wire.closed()

    async with kit.fake_server(script) as fake:
        line = await refused(fake.address, hub)
    assert "the server speaks protocol 3, this client 1 to 2 (run the same netloader release on both sides)" in line


async def test_a_client_that_speaks_another_protocol_version_is_refused() -> None:
    hub = kit.Hub()
    async with kit.serving(hub.transport, HOLDING) as server, kit.fake_client(server) as wire:
        await wire.say(m.Hello(protocol=4, oldest=3, nonce=kit.NONCE, abilities=kit.abilities(hub.transport)))
        told = await wire.hear_until(m.Refusal)
    assert told.code == "version"
    assert told.message == "this server speaks protocol 1 to 2, the client speaks 3 to 4"


async def test_a_plan_that_differs_between_the_sides_is_refused(refused: Refused) -> None:
    hub = kit.Hub()

    async def script(wire: kit.Wire[m.ClientMessage]) -> None:
        await wire.hear_until(m.Hello)
        await wire.say(kit.welcome(hub.transport))
        await wire.hear_until(m.Identify)
        await wire.say(m.Accepted(identity=kit.IDENTITY), kit.announce(HOLDING, block_bytes=2 * kit.BLOCK))
        await wire.closed()

    async with kit.fake_server(script) as fake:
        line = await refused(fake.address, hub)
    assert "both sides derived different blocks (plan " in line


async def test_no_common_transport_is_refused_with_the_reasons(refused: Refused) -> None:
    ours, theirs = kit.Hub(), kit.Hub()
    async with kit.serving(theirs.transport, HOLDING) as server:
        line = await refused(kit.at(server), ours)
    assert "no transport can connect the two sides: memory: the two sides differ in hub" in line


async def test_a_transport_that_only_one_side_names_is_refused(refused: Refused) -> None:
    async with kit.serving(registry.load("gloo"), HOLDING) as server:
        line = await refused(kit.at(server), kit.Hub())
    assert "no transport can connect the two sides: memory: the peer does not have it" in line
    assert "(the peer has gloo; name one on both sides: TRANSPORT gloo or memory)" in line


async def test_a_relay_whose_chain_leads_back_to_the_client_is_refused(refused: Refused) -> None:
    hub = kit.Hub()

    async def script(wire: kit.Wire[m.ClientMessage]) -> None:
        await wire.hear_until(m.Hello)
        await wire.say(kit.welcome(hub.transport))
        asked = await wire.hear_until(m.Identify)
        announce = kit.announce(HOLDING, node="ab" * 8, chain=(asked.node,))
        await wire.say(m.Accepted(identity=kit.IDENTITY), announce)
        await wire.closed()

    async with kit.fake_server(script) as fake:
        line = await refused(fake.address, hub)
    assert "this relay gets its blocks from us (another source is asked instead)" in line


# --- not available --------------------------------------------------------------------------------------------------


async def _loading(server: kit.WatchedServer) -> None:
    server.expect("target", "raw", reason="the model is still being loaded")


async def _failed(server: kit.WatchedServer) -> None:
    server.holdings.refuse("target", "raw", "the model could not be loaded: no file", "pull from another source")


async def _retracted(server: kit.WatchedServer) -> None:
    server.add(HOLDING)
    await server.retract("target", reason="the weights are about to change (sleep)")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (_loading, "the model is still being loaded (a client tries again while its WAIT lasts)"),
        (_failed, "the model could not be loaded: no file (pull from another source)"),
        (_retracted, "the weights are about to change (sleep) (pull from another source)"),
    ],
    ids=["loading", "failed", "retracted"],
)
async def test_a_model_that_is_loading_failed_or_retracted_is_refused_with_that_reason(
    state: Callable[[kit.WatchedServer], Awaitable[None]], reason: str, refused: Refused
) -> None:
    hub = kit.Hub()
    async with kit.serving(hub.transport) as server:
        await state(server)
        assert reason in await refused(kit.at(server), hub)


async def test_blocks_whose_memory_was_freed_are_reported_by_tensor_name(refused: Refused) -> None:
    hub, mine = kit.Hub(), kit.weights()
    holding: TensorHolding = kit.held_weakly(mine)
    async with kit.serving(hub.transport, holding) as server:
        del mine["large"]
        line = await refused(kit.at(server), hub)
    assert "it could not give every block: " in line
    assert "large was dropped by its owner" in line
