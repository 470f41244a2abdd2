"""128 connections that say Hello and then nothing, kept up by new ones: a client is served all the same."""

from __future__ import annotations

import anyio
import pytest

from netloader.core import messages as m
from tests.drivers import kit
from tests.strangers.kinds import KINDS, strangers

SOURCE = kit.weights()
HOLDING = kit.held(SOURCE)


@pytest.mark.parametrize("token", [None, b"open sesame"], ids=["no token", "token"])
async def test_a_client_is_served_at_once_while_silent_hellos_hold_all_places(token: bytes | None) -> None:
    hub, into = kit.Hub(), kit.blank(SOURCE)
    async with (
        kit.serving(hub.transport, HOLDING, token=token) as server,
        strangers([KINDS["128 silent Hellos"]], "127.0.0.1", server.port),
    ):
        await kit.until(lambda: len(server.sessions) == 128)
        async with anyio.create_task_group() as tasks:

            async def keep_up() -> None:
                async with strangers([KINDS["128 silent Hellos"]], "127.0.0.1", server.port):
                    await anyio.sleep_forever()

            tasks.start_soon(keep_up)
            await kit.pull(into, [kit.at(server)], hub.transport, token=token)  # without WAIT: it is never turned away
            tasks.cancel_scope.cancel()

        def numbers() -> list[int]:
            return sorted(s.number for s in server.ended if "waited longest" in str(s.session.error))

        await kit.until(lambda: len(numbers()) == server.gone, "those that were turned away have gone")
        turned_away = numbers()
        assert turned_away == [*range(1, len(turned_away) + 1)] != [], "the oldest ones went"
    assert kit.contents(into) == kit.contents(SOURCE)


async def test_whoever_is_turned_away_is_told_busy_and_when_to_come_again() -> None:
    hub = kit.Hub()
    async with (
        kit.serving(hub.transport, HOLDING, max_strangers=1) as server,
        kit.fake_client(server) as oldest,
        kit.fake_client(server),
    ):
        (refusal,) = await oldest.hear_all()
    assert isinstance(refusal, m.Refusal)
    assert (refusal.code, refusal.retry_after) == ("busy", 1.0)
    assert refusal.message == "others want to connect, and this client has waited longest"
