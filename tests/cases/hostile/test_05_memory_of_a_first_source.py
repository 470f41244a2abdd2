"""What was allocated for a source that delivered nothing is gone without a trace, unless it is still in use."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
import torch

from netloader.checkpoint import OutputFolder, open_checkpoint
from netloader.client import pull as pull_module
from netloader.client.connect import connect
from netloader.client.pull import pull_from
from netloader.core import messages as m
from netloader.core import pull_events as p
from netloader.core.addresses import Address
from netloader.core.manifest import Manifest
from netloader.core.options import PullOptions
from netloader.discovery import FixedSources
from netloader.errors import CheckpointError, MemoryStillInUse
from netloader.observe.events import Event, SourceLeft
from netloader.session.connection import ControlConnection
from netloader.tensors import destination, digest_of, hold
from tests.cases.files import IDENTITY, save, tensors
from tests.core.pull_world import announcement
from tests.core.test_pull import ONE, begun
from tests.drivers import kit
from tests.drivers.test_completion import HUB

HONEST = kit.held(kit.weights())
LARGER = kit.held(kit.weights(rows=41))


def test_files_of_an_announcement_that_was_not_pulled_are_not_published(tmp_path: Path) -> None:
    first = hold(tensors("x", "y", "z"), IDENTITY).announcement.manifest
    content = tensors("a", "b")
    with OutputFolder(tmp_path, shard_bytes=600) as output:
        output.allocate(first, {"format": "mlx"})
        filled = output.allocate(hold(content, IDENTITY).announcement.manifest, {"format": "pt"})
        for name, tensor in filled.items():
            tensor.copy_(content[name])
        output.sync(lambda _, __: None)
        published = output.publish()
    assert sorted(tmp_path.iterdir()) == sorted(published)
    assert all(torch.equal(open_checkpoint(tmp_path).tensors[name], content[name]) for name in content)
    assert open_checkpoint(tmp_path).tensors.keys() == content.keys()


def test_an_error_of_an_announcement_that_was_not_pulled_is_forgotten(tmp_path: Path) -> None:
    save(tmp_path / "m", "model.safetensors", tensors("a"))
    with OutputFolder(tmp_path / "out") as output:
        output.error = error = CheckpointError("too large")
        output.allocate(hold(tensors("a"), IDENTITY).announcement.manifest, None)
        assert output.error is not error


def test_memory_that_a_thread_may_still_write_is_not_freed() -> None:
    pull, _ = begun(ONE, adopts=True)
    pull.handle(p.HoldingAnnounced(1, announcement(3)), 0.0)
    pull.handle(p.MemoryAllocated(1), 0.1)
    pull.handle(p.SessionReady(1), 0.2)
    error = MemoryStillInUse("tcp channel", writes=True, seconds=1.0)
    assert pull.handle(p.SessionEnded(1, error), 0.3) == [p.Fail(error)]


async def test_a_source_that_was_connected_to_meanwhile_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds other tensors than those that memory was allocated for while this side connected to it."""
    adopted, left = anyio.Event(), anyio.Event()

    async def announces_others_and_leaves(wire: kit.Wire[m.ClientMessage]) -> None:
        await wire.hear_until(m.Hello)
        await wire.say(kit.welcome(HUB.transport))
        await wire.hear_until(m.Identify)
        await wire.say(m.Waiting(reason="others are first", position=1))
        await anyio.wait_all_tasks_blocked()
        await wire.say(m.Accepted(identity=kit.IDENTITY), kit.announce(LARGER))
        await wire.hear_until(m.Agree)
        adopted.set()
        await left.wait()
        await wire.say(m.Refusal(code="transport", message="it can't be set up"))

    async with (
        kit.fake_server(announces_others_and_leaves) as rogue,
        kit.serving(HUB.transport, HONEST) as honest,
    ):

        async def slow(source: Address, within: float, known: Manifest | None) -> ControlConnection[m.ServerMessage]:
            if source == kit.at(honest):
                await adopted.wait()
            return await connect(source, within, known)

        def observe(event: Event) -> None:
            if isinstance(event, SourceLeft) and event.source == str(kit.at(honest)):
                left.set()

        monkeypatch.setattr(pull_module, "connect", slow)
        into, options = destination(None), PullOptions(stripe=2, timeout=kit.PATIENCE, connect_timeout=kit.PATIENCE)
        sources = FixedSources([rogue.address, kit.at(honest)])
        report = await pull_from(into, None, sources, [HUB.transport], digest_of, options, observers=[observe])
    assert report.root == HONEST.announcement.root
    assert into.manifest == HONEST.announcement.manifest
