"""An attacker without a token can end its own session only, against the command line with its defaults.

The attacker is this process; the server and the client are `netloader serve` and `netloader pull` in other processes.
The attack over gloo runs wherever gloo is accepted. What it does where both sides name gloo is in
tests/cases/hostile/test_01_gloo_ends_no_process.py and the file after it.
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from netloader import ModelIdentity
from netloader.checkpoint import make_demo_checkpoint, open_checkpoint
from netloader.cli.demo_run import compare_checkpoints
from netloader.codecs.frames import server_messages
from netloader.core import messages as m
from netloader.core.plan import make_plan
from netloader.errors import PeerLost
from netloader.tensors import hold
from netloader.transports.gloo import GlooTransport
from tests.cases.hostile.gloo_attacks import Attack, mark, receipt, zeros
from tests.commands import PATIENCE, Serving, command, serving
from tests.drivers import kit
from tests.transports.bare_gloo import CLIENT, SERVER, BareGloo

GLOO = GlooTransport()
BYTES = 2 << 20


class _WireSignals:
    """The signals of a transport over a scripted control connection."""

    def __init__(self, wire: kit.Wire[Any]) -> None:
        self._wire = wire

    async def post(self, data: bytes) -> None:
        await self._wire.say(m.Signal(data=data))

    async def fetch(self) -> bytes:
        try:
            signalled: m.Signal = await self._wire.hear_until(m.Signal)
        except (anyio.EndOfStream, anyio.BrokenResourceError) as error:
            raise PeerLost("the victim closed") from error
        return signalled.data


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_demo_checkpoint(folder, BYTES)
    return folder


@pytest.fixture
def server(model: Path) -> Iterator[Serving]:
    """A server with defaults: no token, any transport."""
    with serving(model) as process:
        yield process


@pytest.fixture
def narrow(model: Path) -> Iterator[Serving]:
    """A server with one turn."""
    with serving(model, "--max-clients", 1) as process:
        yield process


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[kit.Wire[m.ServerMessage]]:
    host, _, port = address.rpartition(":")
    async with await anyio.connect_tcp(host, int(port)) as stream:
        yield kit.Wire(stream, server_messages())


async def pulled(model: Path, folder: Path, *sources: str) -> None:
    """Have a client with defaults pull from these sources; check that it completes with every byte."""
    with anyio.fail_after(PATIENCE):
        done = await anyio.run_process(command("pull", *sources, "-o", folder), check=False, stderr=subprocess.STDOUT)
    assert done.returncode == 0, f"the client ended with {done.returncode}: {done.stdout.decode()}"
    found = await anyio.to_thread.run_sync(compare_checkpoints, model, folder)
    assert found.tensors > 0
    assert not found.problems


# --- attacks over gloo ------------------------------------------------------------------------------------------------


async def ask_for_gloo(address: str, attack: Attack) -> m.ServerMessage:
    """Choose gloo, whatever the server listed, and attack if the server accepts; return the server's answer."""
    async with connected(address) as wire:
        await wire.say(kit.hello(GLOO), m.Identify(layouts=("checkpoint",)))
        known: m.Announce = await wire.hear_until(m.Announce)
        await wire.say(m.Agree(plan=known.plan, transport="gloo"))
        answer = await wire.hear()
        if isinstance(answer, m.ChannelOffer):
            gloo = BareGloo(CLIENT, _WireSignals(wire))
            await gloo.connect(answer.offer)
            try:
                assert known.manifest is not None
                await attack(gloo, make_plan(known.manifest, known.block_bytes).blocks[0].nbytes)
                await wire.say(m.Want(ranges=((0, 1),)))
                await wire.closed()
            finally:
                await gloo.aclose()
        return answer


# --- against a server -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [receipt, zeros])
async def test_a_client_that_chooses_gloo_ends_its_own_session_only(
    server: Serving, model: Path, tmp_path: Path, attack: Attack
) -> None:
    answer = await ask_for_gloo(server.address, attack)
    await pulled(model, tmp_path / "copy", server.address)
    assert server.process.poll() is None
    assert isinstance(answer, m.Refusal), "gloo was granted"
    assert answer.code == "transport"


async def test_by_default_gloo_is_not_offered(server: Serving) -> None:
    async with connected(server.address) as wire:
        await wire.say(kit.hello(GLOO))
        welcome: m.Welcome = await wire.hear_until(m.Welcome)
    assert "gloo" not in [ability.name for ability in welcome.abilities]


# --- against a client -------------------------------------------------------------------------------------------------


class Rogue:
    """A server that has gloo only, and sends a mark of 16 bytes where one without any is expected."""

    def __init__(self, model: Path) -> None:
        identity = ModelIdentity(model=model.name, layout="checkpoint")
        self._holding = hold(open_checkpoint(model).tensors, identity)
        self.over = anyio.Event()
        self.answer: m.ClientMessage | None = None

    async def script(self, wire: kit.Wire[m.ClientMessage]) -> None:
        try:
            await self._script(wire)
        finally:
            self.over.set()

    async def _script(self, wire: kit.Wire[m.ClientMessage]) -> None:
        await wire.hear_until(m.Hello)
        await wire.say(kit.welcome(GLOO))
        await wire.hear_until(m.Identify)
        announcement = self._holding.announcement
        await wire.say(m.Accepted(identity=announcement.identity), kit.announce(self._holding))
        self.answer = await wire.hear()
        if isinstance(self.answer, m.Agree):
            async with anyio.create_task_group() as tasks:
                gloo = BareGloo(SERVER, _WireSignals(wire))
                await wire.say(m.ChannelOffer(transport="gloo", offer=await gloo.offer(tasks)))
                await gloo.accept()
                await mark(gloo, announcement.plan.blocks[0].nbytes)
                wanted: m.Want = await wire.hear_until(m.Want)
                await wire.say(m.Grant(ranges=wanted.ranges))
                await wire.closed()
                await gloo.aclose()


async def test_a_server_that_offers_gloo_only_is_left_for_the_next_source(
    narrow: Serving, model: Path, tmp_path: Path
) -> None:
    """The good source is busy until the attacking one has been tried."""
    rogue = await anyio.to_thread.run_sync(Rogue, model)
    async with (
        kit.fake_server(rogue.script) as fake,
        anyio.create_task_group() as tasks,  # ends when the client has ended
        connected(narrow.address) as busy,
    ):
        await busy.say(kit.hello(GLOO), m.Identify(layouts=("checkpoint",)))
        await busy.hear_until(m.Announce)
        tasks.start_soon(pulled, model, tmp_path / "copy", str(fake.address), narrow.address)
        with anyio.fail_after(PATIENCE):
            await rogue.over.wait()
    assert isinstance(rogue.answer, m.Goodbye), "gloo was used"
    assert rogue.answer.code == "transport"
