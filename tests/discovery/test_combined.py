"""Several backends as one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import anyio
import msgspec
import pytest

from netloader.core.addresses import Address
from netloader.core.entries import Entry, Load
from netloader.core.sources import Source
from netloader.discovery import Appeared, Backend, FixedSources, Listed, SourceChange, Vanished, Wanted
from netloader.discovery.combined import MergedSources, combined
from netloader.discovery.conformance import BACKEND_CHECKS, BackendCheck, check_backend
from netloader.discovery.folder import Folder
from netloader.discovery.leases import LeaseBackend
from netloader.discovery.memory import MemoryRegistry
from netloader.errors import ConfigError, DiscoveryError
from tests.discovery.world import Faulty, Watcher
from tests.drivers.jumping import run

AT = Address("10.0.0.1", 1)
ENTRY = Entry("key", str(AT), "first", labels={"zone": "a"})
SOON = 10.0


@pytest.mark.parametrize("check", BACKEND_CHECKS, ids=lambda check: check.__name__)
def test_it_is_a_backend(check: BackendCheck, tmp_path: Path) -> None:
    registry, other = MemoryRegistry(), MemoryRegistry()

    async def main(_: object) -> None:
        await check_backend(
            lambda: combined([Folder(str(tmp_path)), LeaseBackend(registry), LeaseBackend(other)]), [check]
        )

    run(main)


def test_one_backend_stays_itself_and_none_is_an_error(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    assert combined([folder]) is folder
    with pytest.raises(ConfigError, match="one URL or more"):
        combined([])


def test_it_publishes_and_claims_as_far_as_any_of_them_can(tmp_path: Path) -> None:
    class Records:
        def sources(self, wanted: Wanted) -> FixedSources:
            del wanted
            return FixedSources([AT])

        def publisher(self) -> None:
            return None

        def claims(self) -> None:
            return None

    neither: Backend = combined([Records(), Records()])
    assert neither.publisher() is None
    assert neither.claims() is None
    folder: Backend = combined([Records(), Folder(str(tmp_path))])
    assert folder.publisher() is not None
    assert folder.claims() is None
    assert combined([Records(), LeaseBackend(MemoryRegistry())]).claims() is not None


class Script:
    """Yields changes when it is told to."""

    def __init__(self) -> None:
        self.steps, self.changes = anyio.create_memory_object_stream[SourceChange | Exception](100)

    async def watch(self) -> AsyncGenerator[SourceChange, None]:
        async for change in self.changes:
            if isinstance(change, Exception):
                raise change
            yield change


def source(load: float = 0.0, generation: str = "", **labels: str) -> Source:
    return Source(AT, labels, load, generation)


def told(*steps: tuple[int, SourceChange | Exception | None]) -> list[SourceChange]:
    """What two merged streams tell. None ends a stream; the last step ends both."""

    async def main(_: object) -> list[SourceChange]:
        scripts = [Script(), Script()]
        changes: list[SourceChange] = []

        async def watch() -> None:
            changes.extend([change async for change in MergedSources(scripts).watch()])

        with anyio.fail_after(SOON):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch)
                for stream, step in steps:
                    if step is None:
                        scripts[stream].steps.close()
                    else:
                        scripts[stream].steps.send_nowait(step)
                    await anyio.sleep(0.01)
                for script in scripts:
                    script.steps.close()
        for script in scripts:
            script.changes.close()
        return changes

    return run(main, alone=True)


def test_a_source_vanishes_when_the_last_one_no_longer_finds_it() -> None:
    first, second = source(zone="a"), source(zone="b")
    assert told((0, Appeared(first)), (1, Appeared(second)), (1, Vanished(AT)), (0, Vanished(AT))) == [
        *(Appeared(first), Vanished(AT), Listed()),
    ]
    assert told((1, Appeared(second)), (0, Appeared(first)), (0, Vanished(AT)), (1, Vanished(AT))) == [
        *(Appeared(second), Appeared(first), Appeared(second), Vanished(AT), Listed()),
    ]


def test_another_generation_is_another_source_whoever_says_it() -> None:
    assert told((0, Appeared(source(generation="1"))), (0, Vanished(AT)), (0, Appeared(source(generation="2")))) == [
        *(Appeared(source(generation="1")), Vanished(AT), Appeared(source(generation="2")), Listed()),
    ]
    assert told((1, Appeared(source(generation="1"))), (0, Appeared(source(generation="2")))) == [
        *(Appeared(source(generation="1")), Vanished(AT), Appeared(source(generation="2")), Listed()),
    ]
    # One that knows no generations does not say that it is another one.
    assert told((1, Appeared(source(generation="1"))), (0, Appeared(source()))) == [
        *(Appeared(source(generation="1")), Appeared(source()), Listed()),
    ]


def test_listed_comes_when_each_has_listed_ended_or_failed(caplog: pytest.LogCaptureFixture) -> None:
    at = Appeared(source())
    assert told((0, Listed()), (0, at), (1, Listed()), (1, Listed())) == [at, Listed()]
    assert told((0, Listed()), (1, None), (0, at)) == [Listed(), at]
    assert told((0, at), (1, DiscoveryError("it is broken")), (0, Listed())) == [at, Listed()]
    assert [record.getMessage() for record in caplog.records] == [
        "netloader: Script failed; what it found stays known: it is broken"
    ]


def test_one_registry_that_is_down_does_not_stop_the_other() -> None:
    async def main(_: object) -> None:
        up, down = Faulty(), Faulty()
        down.stop()
        both = combined([LeaseBackend(down), LeaseBackend(up)])
        watcher = Watcher(both.sources(Wanted("key")))
        publisher = both.publisher()
        assert publisher is not None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watcher.run)
            async with publisher.publish(ENTRY) as published:
                await watcher.until(lambda: AT in watcher.sources, SOON)
                published.update(msgspec.structs.replace(ENTRY, load=Load(clients=2)))
                await watcher.until(lambda: watcher.sources[AT].load == 2.0, SOON)
                down.start()
                await watcher.until(watcher.listed.is_set, SOON)
                up.stop()
                published.update(msgspec.structs.replace(ENTRY, load=Load(clients=3)))
                await watcher.until(lambda: watcher.sources[AT].load == 3.0, SOON)
                up.start()
            await watcher.until(lambda: AT not in watcher.sources, SOON)
            tasks.cancel_scope.cancel()

    run(main, alone=True)
