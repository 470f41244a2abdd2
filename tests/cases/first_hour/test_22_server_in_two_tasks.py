"""A server may be entered in one task and left in another one, as a fixture of pytest-asyncio does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch

import netloader
from netloader.errors import ConfigError, LocalProtocolError, ManifestError

WEIGHTS = {"w": torch.arange(1000)}


def server() -> netloader.Server:
    return netloader.Server(WEIGHTS, host="127.0.0.1", transport="memory")


async def in_a_task(call: Any) -> Any:
    return await asyncio.create_task(call)


async def pulls(source: netloader.Server) -> bool:
    tensors, _ = await netloader.pull_new(sources=[source.address], transport="memory")
    return torch.equal(tensors["w"], WEIGHTS["w"])


async def test_a_fixture_that_yields_a_server_can_be_torn_down_in_another_task() -> None:
    async def fixture() -> AsyncIterator[netloader.Server]:
        async with server() as running:
            yield running

    # pytest-asyncio runs set-up, test and teardown in three tasks of one loop.
    generator = fixture()
    running = await in_a_task(generator.__anext__())
    assert await in_a_task(pulls(running))
    with pytest.raises(StopAsyncIteration):
        await in_a_task(generator.__anext__())
    with pytest.raises(netloader.NetloaderError):
        await netloader.probe(running.address)


async def test_the_error_of_the_body_is_raised_as_it_is() -> None:
    with pytest.raises(KeyError, match="body"):
        async with server():
            raise KeyError("body")


async def test_a_cancelled_body_leaves_the_server_ended() -> None:
    entered, address = anyio.Event(), []

    async def body() -> None:
        async with server() as running:
            address.append(running.address)
            entered.set()
            await anyio.sleep_forever()

    task = asyncio.create_task(body())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(netloader.NetloaderError):
        await netloader.probe(address[0])


async def test_entering_that_is_cancelled_leaves_nothing(no_leaked_descriptors: None) -> None:
    class Slow(netloader.Server):
        async def hold(self, *_: Any, **__: Any) -> str:
            holding.set()
            await anyio.sleep_forever()
            return ""

    holding = anyio.Event()
    task = asyncio.create_task(Slow(WEIGHTS, host="127.0.0.1", transport="memory").__aenter__())
    await holding.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [one.get_name() for one in asyncio.all_tasks() if one.get_name() == "the server"] == []


async def test_leaving_that_is_cancelled_is_finished_first(no_leaked_descriptors: None) -> None:
    running = await server().__aenter__()
    leaving = asyncio.create_task(running.__aexit__(None, None, None))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert [one.get_name() for one in asyncio.all_tasks() if one.get_name() == "the server"] == []


async def test_an_error_on_entering_is_raised_as_it_is() -> None:
    with pytest.raises(ManifestError):
        await netloader.Server({"w": torch.zeros(1).to_sparse()}, host="127.0.0.1", transport="memory").__aenter__()
    with pytest.raises(ConfigError):
        await netloader.Server(host="192.0.2.1", transport="memory").__aenter__()


async def test_a_server_is_used_once() -> None:
    running = server()
    with pytest.raises(LocalProtocolError, match="not running"):
        await running.__aexit__(None, None, None)
    async with running:
        with pytest.raises(LocalProtocolError, match="started before"):
            await running.__aenter__()
    with pytest.raises(LocalProtocolError, match="not running"):
        await running.__aexit__(None, None, None)
    with pytest.raises(LocalProtocolError, match="started before"):
        await running.__aenter__()


async def test_an_unexpected_end_is_logged_and_raised_on_leaving(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = anyio.Event()

    async def breaks(*_: Any) -> None:
        await broken.wait()
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(netloader.Server, "_accept", breaks)
    running = await server().__aenter__()
    broken.set()
    with anyio.fail_after(10):
        while not caplog.messages:
            await anyio.lowlevel.checkpoint()
    assert "the server ended unexpectedly" in caplog.text
    with pytest.raises(ExceptionGroup) as caught:
        await running.__aexit__(None, None, None)
    assert caught.group_contains(ZeroDivisionError, match="a bug")
