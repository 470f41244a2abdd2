"""``dir:PATH``: files in a folder. Its files are real, its seconds are simulated."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import msgspec
import pytest

from netloader.core.addresses import Address
from netloader.core.entries import Entry, Load, encode_entry
from netloader.discovery import Backend, Wanted
from netloader.discovery.conformance import BACKEND_CHECKS, PROVIDER_CHECKS, BackendCheck, check_backend, check_provider
from netloader.discovery.conformance.provider import ProviderCheck
from netloader.discovery.folder import Folder, open_folder
from netloader.discovery.registry import open_backend
from netloader.errors import ConfigError
from tests.discovery.forged import forged
from tests.discovery.world import Watcher
from tests.drivers.jumping import run

ONE = Entry("key", "10.0.0.1:1", "first", labels={"zone": "ä"})
AT_ONE, AT_TWO = Address("10.0.0.1", 1), Address("10.0.0.2", 1)
AT_ONCE = 3.0


def watched(path: Path | str, work: Callable[[Watcher], Awaitable[None]], rank: int = 0) -> Watcher:
    async def main(_: object) -> Watcher:
        watcher = Watcher(Folder(str(path)).sources(Wanted("key", rank)))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watcher.run)
            await work(watcher)
            tasks.cancel_scope.cancel()
        return watcher

    return run(main)


@pytest.mark.parametrize("check", BACKEND_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("end", ["/", "", "/fleet-"])
def test_a_folder_is_a_backend(check: BackendCheck, end: str, tmp_path: Path) -> None:
    async def main(_: object) -> None:
        await check_backend(lambda: open_backend(f"dir:{tmp_path}{end}"), [check])

    run(main)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("check", PROVIDER_CHECKS, ids=lambda check: check.__name__)
def test_address_files_are_found(check: ProviderCheck, tmp_path: Path) -> None:
    @asynccontextmanager
    async def available(address: Address) -> AsyncIterator[None]:
        file = tmp_path / f"host-{address.host.replace(':', '-')}-rank-3.txt"
        await anyio.Path(file).write_text(f"{address}\n")
        yield
        await anyio.Path(file).unlink()

    async def main(_: object) -> None:
        await check_provider(Folder(str(tmp_path)).sources(Wanted("key", 3)), available, [check])

    run(main)


def test_it_cannot_claim(tmp_path: Path) -> None:
    backend: Backend = open_folder(f"dir:{tmp_path}")
    assert isinstance(backend, Backend)
    assert backend.claims() is None


@pytest.mark.parametrize("url", ["dir:", "dir:some/folder", "dir:/a\0b"])
def test_a_path_is_absolute(url: str) -> None:
    with pytest.raises(ConfigError, match="not absolute; allowed: dir:PATH"):
        open_backend(url)


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("0.txt", 0),
        ("rank-0.txt", 0),
        ("host7-12.txt", 12),
        ("12.txt", 12),
        ("host7.x.txt", None),
        ("server.txt", None),
    ],
)
def test_the_name_of_an_address_file_may_say_the_rank(name: str, rank: int | None, tmp_path: Path) -> None:
    (tmp_path / name).write_text("10.0.0.1:1")

    async def work(watcher: Watcher) -> None:
        await watcher.until(watcher.listed.is_set, AT_ONCE)

    for asked in (0, 1, 12):
        found = watched(tmp_path, work, rank=asked).sources
        assert list(found) == ([AT_ONE] if rank in {None, asked} else [])


def test_a_prefix_leaves_out_other_files(tmp_path: Path) -> None:
    (tmp_path / "mine-0.txt").write_text("10.0.0.1:1")
    (tmp_path / "other-0.txt").write_text("10.0.0.2:1")

    async def work(watcher: Watcher) -> None:
        await watcher.until(watcher.listed.is_set, AT_ONCE)

    assert list(watched(tmp_path / "mine-", work).sources) == [AT_ONE]
    assert list(watched(tmp_path, work).sources) == [AT_ONE, AT_TWO]


def test_an_entry_says_more_than_an_address_file_of_the_same_server(tmp_path: Path) -> None:
    """What is known to be another model is not tried, and one server is not found twice."""

    async def work(watcher: Watcher) -> None:
        publisher = Folder(str(tmp_path)).publisher()
        other = msgspec.structs.replace(ONE, key="another", address=str(AT_TWO))
        async with publisher.publish(ONE), publisher.publish(other):
            await anyio.Path(tmp_path / "a-0.txt").write_text(str(AT_ONE))
            await anyio.Path(tmp_path / "b-0.txt").write_text(str(AT_TWO))
            await anyio.sleep(AT_ONCE)
            assert watcher.sources == {AT_ONE: ONE.source()}
        await watcher.until(lambda: [one.labels for one in watcher.sources.values()] == [{}, {}], AT_ONCE)

    watched(tmp_path, work)


def test_files_that_are_no_servers_are_left_out_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("10.0.0.1:1")
    (tmp_path / "b.txt").write_bytes(b"\xff" * 100_000)
    (tmp_path / "c.txt").mkdir()
    (tmp_path / "d.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "e.json").write_text("{}")
    (tmp_path / ".f.txt").write_text("10.0.0.2:1")
    (tmp_path / "h.txt").write_text("")
    (tmp_path / f"netloader-0-{'a' * 32}.json").write_text("{}")
    os.mkfifo(tmp_path / "g.txt")
    (tmp_path / "i\x1b[31m.txt").write_text("nowhere")

    async def work(watcher: Watcher) -> None:
        await anyio.sleep(60.0)
        assert list(watcher.sources) == [AT_ONE]

    watched(tmp_path, work)
    said = [record.getMessage().partition(f"{tmp_path}: ")[2].split()[0] for record in caplog.records]
    assert sorted(said) == ["b.txt", "c.txt", "g.txt", "h.txt", "i\\x1b[31m.txt", f"netloader-0-{'a' * 32}.json"]


def test_forged_files_hide_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text(str(AT_ONE))
    values = forged(Entry("key", str(AT_TWO), "first"))
    for number, value in enumerate(values.values()):
        (tmp_path / f"netloader-0-{number:032x}.json").write_bytes(value)

    async def work(watcher: Watcher) -> None:
        await anyio.sleep(60.0)
        assert list(watcher.sources) == [AT_ONE]

    watched(tmp_path, work)
    assert len([record for record in caplog.records if "is left out" in record.getMessage()]) == len(values)


def test_a_folder_that_is_not_there_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "later"

    async def work(watcher: Watcher) -> None:
        async with Folder(f"{folder}/").publisher().publish(ONE):
            await anyio.sleep(60.0)
            assert watcher.words == []
            await anyio.Path(folder).mkdir()
            await watcher.until(lambda: AT_ONE in watcher.sources, AT_ONCE)
            await anyio.Path(folder).rename(tmp_path / "moved")
            await anyio.sleep(60.0)
            assert AT_ONE in watcher.sources
            await anyio.Path(tmp_path / "moved").rename(folder)
            await anyio.sleep(AT_ONCE)
            assert AT_ONE in watcher.sources

    watched(f"{folder}/", work)
    assert list(folder.iterdir()) == []
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 3  # the server once, the client twice


def test_updates_are_written_seldom(tmp_path: Path) -> None:
    async def work(watcher: Watcher) -> None:
        async with Folder(str(tmp_path)).publisher().publish(ONE) as published:
            await watcher.until(lambda: AT_ONE in watcher.sources, AT_ONCE)
            for clients in range(1, 301):
                published.update(msgspec.structs.replace(ONE, load=Load(clients=clients)))
                await anyio.sleep(0.1)
            await watcher.until(lambda: watcher.sources[AT_ONE].load == 300.0, 10.0)
            assert len(watcher.words) <= 3 + 30 / 5 + 1

    watched(tmp_path, work)


def test_a_file_system_that_hangs_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hangs, over, stuck = threading.Event(), threading.Event(), []
    scandir = os.scandir

    def hanging(path: object) -> object:
        if hangs.is_set():
            stuck.append(path)
            assert over.wait(60.0)
        return scandir(path)  # type: ignore[call-overload]

    monkeypatch.setattr("netloader.discovery.folder.os.scandir", hanging)
    (tmp_path / "0.txt").write_text(str(AT_ONE))

    async def main() -> None:
        watcher = Watcher(Folder(str(tmp_path)).sources(Wanted("key")))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watcher.run)
            with anyio.fail_after(30.0):
                await watcher.listed.wait()
                hangs.set()
                while not caplog.records:  # noqa: ASYNC110 - a log line tells nobody
                    await anyio.sleep(0.05)
                await anyio.sleep(2.0)  # it tries again, and starts no second thread
                assert list(watcher.sources) == [AT_ONE]
                assert len(stuck) == 1
                hangs.clear()
                over.set()
                await anyio.Path(tmp_path / "0.txt").unlink()
                while watcher.sources:  # noqa: ASYNC110 - as above
                    await anyio.sleep(0.05)
            tasks.cancel_scope.cancel()

    anyio.run(main)
    assert "does not answer within 5 s" in caplog.text


def test_what_is_published_can_be_read_by_people(tmp_path: Path) -> None:
    async def work(watcher: Watcher) -> None:
        async with Folder(str(tmp_path)).publisher().publish(ONE):
            (text,) = [await file.read_bytes() async for file in anyio.Path(tmp_path).iterdir()]
            assert msgspec.json.decode(text) == msgspec.json.decode(encode_entry(ONE))
            assert text.isascii()
            del watcher

    watched(tmp_path, work)
