"""A message that gloo does not expect ends the session of whoever sent it, on both sides, with and without a token."""

from __future__ import annotations

import anyio
import pytest

from netloader.core.addresses import Address
from netloader.errors import NoSourceLeft
from tests.cases.hostile.gloo_attacks import AttackingGloo, mark, processes_below, receipt
from tests.drivers import kit, peers

SOURCE = kit.weights(rows=3)
BLOCKS = len(kit.held(SOURCE).announcement.plan.blocks)
TOKEN = "0123456789abcdef"

either = pytest.mark.parametrize("token", [None, TOKEN], ids=["open", "token"])


def secret(token: str | None) -> bytes | None:
    return None if token is None else token.encode()


@either
async def test_a_server_lives_and_serves_the_next_client(token: str | None) -> None:
    async with peers.peer("serve", transport="gloo", rows=3, token=token) as server, anyio.create_task_group() as tasks:
        at = [Address("127.0.0.1", (await server.hear())["port"])]
        into = kit.blank(SOURCE)
        gloo = kit.carrier("gloo")
        await kit.pull(into, at, gloo, token=secret(token))
        before = await server.until(lambda seen: not seen["sessions"])
        attacking = AttackingGloo(receipt, tasks)
        with pytest.raises(NoSourceLeft):
            await kit.pull(kit.blank(SOURCE), at, attacking, token=secret(token))
        assert attacking.attacked.is_set()
        await server.until(lambda seen: not seen["sessions"])
        assert "TransportError" in (await server.ask("errors"))["errors"]
        assert len(processes_below(server.process.pid)) == 1, "not only the spawner is left"

        into = kit.blank(SOURCE)
        await kit.pull(into, at, gloo, token=secret(token))
        assert kit.contents(into) == kit.contents(SOURCE)
        await server.until(
            lambda seen: not seen["sessions"] and seen["fds"] <= before["fds"] and seen["threads"] <= before["threads"]
        )
        assert await server.finish() == 0


@either
async def test_a_client_lives_and_goes_to_the_next_source(token: str | None) -> None:
    async with anyio.create_task_group() as tasks:
        attacking = AttackingGloo(mark, tasks)
        held = kit.held(SOURCE)
        async with (
            kit.serving(attacking, held, token=secret(token)) as bad,
            kit.serving(kit.carrier("gloo"), held, token=secret(token)) as good,
            peers.peer(
                "pull",
                transport="gloo",
                rows=3,
                ports=[bad.port, good.port],
                token=token,
            ) as client,
        ):
            outcome = await client.outcome()
        assert attacking.attacked.is_set()
        assert outcome.get("right"), outcome
        assert outcome["blocks"] == {f"127.0.0.1:{bad.port}": 0, f"127.0.0.1:{good.port}": BLOCKS}
