"""However many connect, a server leaves at least half of the descriptors to what runs beside it."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import pytest

from netloader.transports.conformance_kit import open_descriptors
from tests.drivers import kit
from tests.strangers.kinds import Kind, connect, strangers

SOURCE = kit.weights()
HOLDING = kit.held(SOURCE)
FILES = 200


@pytest.fixture
def _few_files() -> Iterator[None]:
    """A limit of descriptors, of which this process, which plays the strangers too, has its own beside."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("_few_files")
def test_the_limits_follow_the_limit_of_open_files() -> None:
    from netloader.core.options import ServeOptions
    from netloader.server.server import HoldingServer

    limits = HoldingServer([], ServeOptions())._limits
    assert limits.connections + 8 * limits.channels <= FILES // 2


async def test_520_connections_take_one_descriptor_each_and_no_more_than_allowed() -> None:
    hub, into = kit.Hub(), kit.blank(SOURCE)
    async with kit.serving(hub.transport, HOLDING, max_strangers=100) as server:
        before = len(open_descriptors())
        async with strangers([Kind(520, connect, secret=False)], "127.0.0.1", server.port):
            await kit.until(lambda: server.gone == 420)
            # One at the server and one here for each that is connected, and one here for each that is not.
            assert len(open_descriptors()) - before <= 520 + 100 + 5
            await kit.pull(into, [kit.at(server)], hub.transport)
            os.close(os.open(os.devnull, os.O_RDONLY))
    assert kit.contents(into) == kit.contents(SOURCE)
