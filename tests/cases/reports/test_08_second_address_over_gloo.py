"""A server at an address that is not its host's primary one can be pulled from over gloo."""

from __future__ import annotations

from dataclasses import replace

import anyio
import pytest

from netloader.core.addresses import Address
from netloader.transports.conformance import local_signals
from netloader.transports.gloo.addresses import source_for
from tests.drivers import kit
from tests.transports.bare_gloo import address_of
from tests.transports.pairs import setup_for

GLOO = kit.carrier("gloo")
SOURCE = kit.weights(rows=3)


@pytest.mark.parametrize("host", ["127.0.0.2", "127.0.1.1"])
async def test_another_loopback_address(host: str) -> None:
    into = kit.blank(SOURCE)
    async with kit.serving(GLOO, kit.held(SOURCE), host=host) as server:
        with anyio.fail_after(20):  # it gave up after 25 s
            await kit.pull(into, [Address(host, server.port)], GLOO)
    assert kit.contents(into) == kit.contents(SOURCE)


async def test_a_server_says_from_where_it_connects_only_if_that_is_another_address() -> None:
    ours, theirs = local_signals()
    for host, says in (("127.0.0.1", ""), ("127.0.0.2", "127.0.0.1")):
        pending = await GLOO.offer(replace(setup_for(ours, host=host), peer_host="127.0.0.1"))
        assert address_of(pending.offer).host == host
        assert address_of(pending.offer).dials_from == says
        assert (b"dials_from" in pending.offer) is bool(says)
        await pending.aclose()
    ours.close()
    theirs.close()


def test_the_source_is_what_the_system_chooses() -> None:
    assert source_for("127.0.0.1", "127.0.0.9") == "127.0.0.1"
    assert source_for("::ffff:127.0.0.1", "127.0.0.9") == "127.0.0.1"
    assert source_for("0.0.0.1", "10.1.2.3")  # wherever that leads, there is an answer
