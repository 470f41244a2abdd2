"""A process that is forked while a server runs does not keep its port: it is free when the server ends."""

from __future__ import annotations

import os
import socket

import anyio.to_thread
import pytest

from netloader.server.listening import Listening
from tests.drivers import kit


def forked(listening: Listening, *, closes: bool) -> tuple[int, int]:
    """A child that stays alive, and the end of a pipe that ends it when it is closed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0 if all(one.fileno() < 0 for one in listening.sockets) is closes else 1)
    os.close(read)
    return child, write


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_closes_its_copies_of_the_listening_sockets() -> None:
    listening = Listening("127.0.0.1", 0)
    child, pipe = forked(listening, closes=True)
    os.close(pipe)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    listening.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_port_is_free_for_a_new_server_while_a_forked_process_has_a_copy() -> None:
    """A copy that nothing closes, such as one that was passed on."""
    listening = Listening("127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    copy = listening.sockets[0].dup()
    listening.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 10)
    again = Listening("127.0.0.1", port)
    again.close()
    copy.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_clients_are_refused_at_once_after_a_server_ended_whose_process_has_forked() -> None:
    async with kit.serving(kit.Hub().transport, kit.held(kit.weights())) as server:
        listening = server._listening
        assert listening is not None
        child, pipe = await anyio.to_thread.run_sync(lambda: forked(listening, closes=True))
    with pytest.raises(OSError, match=r"All connection attempts failed|refused"):
        await anyio.connect_tcp("127.0.0.1", server.port)
    os.close(pipe)
    await anyio.to_thread.run_sync(os.waitpid, child, 0)
