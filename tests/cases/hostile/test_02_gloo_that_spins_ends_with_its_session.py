"""Bytes that make gloo spin, and silence: the session ends in time, and leaves no process, thread or descriptor."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from netloader.checkpoint import make_demo_checkpoint
from netloader.client.pull import pull_from
from netloader.core.addresses import parse_address
from netloader.core.options import PullOptions, Timings
from netloader.discovery.fixed import FixedSources
from netloader.errors import NoSourceLeft, TransferTimeout
from netloader.tensors import destination, digest_of
from netloader.transports.gloo import GlooTransport
from tests.cases.hostile.gloo_attacks import AttackingGloo, command_of, processes_below, threads_of, zeros
from tests.commands import Serving, serving
from tests.drivers import kit
from tests.transports.bare_gloo import started

SOURCE = kit.weights(rows=3)
TOKEN = b"0123456789abcdef"
SHORT = Timings(hello=kit.PATIENCE, validate=kit.PATIENCE, plan=kit.PATIENCE, stall=1.0, finalize=1.0)

either = pytest.mark.parametrize("token", [None, TOKEN], ids=["open", "token"])


async def attack(server: kit.WatchedServer, attacking: AttackingGloo, token: bytes | None) -> None:
    with pytest.raises(NoSourceLeft):
        await kit.pull(kit.blank(SOURCE), [kit.at(server)], attacking, token=token)


def gloos() -> list[int]:
    """Processes below this one that have made a group, which is what gloo's own thread is for."""
    return [
        pid for pid in processes_below(os.getpid()) if b"gloo.spawner" in command_of(pid) and len(threads_of(pid)) > 1
    ]


def spins(pid: int) -> bool:
    """Whether a process uses a processor all the time; one that has ended does not."""
    try:
        before = _ticks(pid)
        time.sleep(0.3)  # a rate needs some time
        return _ticks(pid) - before >= 3
    except (FileNotFoundError, ProcessLookupError):
        return False


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.fixture(scope="module")
def gloo() -> GlooTransport:
    return started()


@either
@pytest.mark.usefixtures("no_leaked_descriptors")
async def test_the_turn_is_free_after_the_stall_time(gloo: GlooTransport, token: bytes | None) -> None:
    async with (
        kit.serving(gloo, kit.held(SOURCE), timings=SHORT, max_clients=1, token=token) as server,
        anyio.create_task_group() as tasks,
    ):
        for _ in range(2):
            await attack(server, AttackingGloo(zeros, tasks), token)
        await kit.until(lambda: not server.sessions)
        assert [type(session.session.error) for session in server.ended] == [TransferTimeout] * 2
        into = kit.blank(SOURCE)
        await kit.pull(into, [kit.at(server)], gloo, token=token)
        assert kit.contents(into) == kit.contents(SOURCE)
        await kit.until(lambda: not server.sessions)
    assert not gloos()


@pytest.mark.usefixtures("no_leaked_descriptors")
async def test_retracting_ends_what_spins(gloo: GlooTransport) -> None:
    async with (
        kit.serving(gloo, kit.held(SOURCE), stop_within=1.0) as server,
        anyio.create_task_group() as tasks,
    ):
        attacking = AttackingGloo(zeros, tasks)
        tasks.start_soon(attack, server, attacking, None)
        await attacking.attacked.wait()
        before = gloos()
        assert any([await anyio.to_thread.run_sync(spins, pid) for pid in before])
        with anyio.fail_after(10):
            await server.retract(reason="the test changes it", within=0.5)
        assert not set(before) & set(gloos())


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Serving]:
    make_demo_checkpoint(tmp_path / "model", 1 << 20)
    with serving(tmp_path / "model", "--transport", "gloo") as process:
        yield process


async def test_a_server_that_is_told_to_end_does_so_at_once(server: Serving) -> None:
    async with anyio.create_task_group() as tasks:
        attacking = AttackingGloo(zeros, tasks)

        async def pull() -> None:
            sources = FixedSources([parse_address(server.address)])
            options = PullOptions(timeout=kit.PATIENCE, timings=kit.CALM, layouts=("checkpoint",))
            with pytest.raises(NoSourceLeft):
                await pull_from(destination(None), None, sources, [attacking], digest_of, options)

        tasks.start_soon(pull)
        await attacking.attacked.wait()
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        await anyio.to_thread.run_sync(server.read_to_end)
        assert time.monotonic() - began < 10
    assert server.process.returncode == 0
