"""A fixture yields a server: for each test, for a module, and for the whole session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio
import torch

import netloader

WEIGHTS = {
    "embed": torch.randn(1000, 64),
    "half": torch.randn(64, 100).to(torch.bfloat16),
    "scale": torch.tensor(0.5, dtype=torch.float64),
    "array": torch.from_numpy(np.arange(5000, dtype=np.int32)),
    "nothing": torch.empty(0, 3),
}
IDENTITY = netloader.ModelIdentity(model="fixtures")


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy())


async def pulls_everything(server: netloader.Server) -> None:
    mine = {name: torch.empty_like(tensor) for name, tensor in WEIGHTS.items()}
    report = await netloader.pull(mine, IDENTITY, sources=[server.address], timeout=60)
    assert {name: bits(tensor) for name, tensor in mine.items()} == {name: bits(t) for name, t in WEIGHTS.items()}
    assert report.nbytes == sum(tensor.nbytes for tensor in WEIGHTS.values())


@pytest_asyncio.fixture
async def server() -> AsyncIterator[netloader.Server]:
    async with netloader.Server(WEIGHTS, IDENTITY, host="127.0.0.1") as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server_of_the_module() -> AsyncIterator[netloader.Server]:
    async with netloader.Server(WEIGHTS, IDENTITY, host="127.0.0.1") as running:
        yield running


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def server_of_the_session() -> AsyncIterator[netloader.Server]:
    async with netloader.Server(WEIGHTS, IDENTITY, host="127.0.0.1") as running:
        yield running


@pytest.mark.asyncio
@pytest.mark.usefixtures("leaves_nothing")
async def test_a_server_of_its_own(server: netloader.Server) -> None:
    await pulls_everything(server)


@pytest.mark.asyncio
@pytest.mark.usefixtures("leaves_nothing")
async def test_numpy_arrays_are_filled_through_torch(server: netloader.Server) -> None:
    array = np.zeros(5000, dtype=np.int32)
    mine = {name: torch.empty_like(tensor) for name, tensor in WEIGHTS.items()} | {"array": torch.from_numpy(array)}
    await netloader.pull(mine, IDENTITY, sources=[server.address])
    assert array.tolist() == list(range(5000))


@pytest.mark.asyncio
async def test_numpy_arrays_themselves_are_refused_by_name(server: netloader.Server) -> None:
    with pytest.raises(netloader.ManifestError, match="array: it is no tensor but ndarray"):
        await netloader.pull({"array": np.zeros(3)}, sources=[server.address])  # type: ignore[dict-item]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("time", [1, 2])
async def test_the_server_of_the_module(server_of_the_module: netloader.Server, time: int) -> None:
    await pulls_everything(server_of_the_module)


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("time", [1, 2])
async def test_the_server_of_the_session(server_of_the_session: netloader.Server, time: int) -> None:
    await pulls_everything(server_of_the_session)


@pytest_asyncio.fixture
async def relay(server: netloader.Server) -> AsyncIterator[netloader.Server]:
    async with netloader.Server(host="127.0.0.1") as running:
        yield running


@pytest.mark.asyncio
@pytest.mark.usefixtures("leaves_nothing")
async def test_a_fixture_that_needs_another_one(server: netloader.Server, relay: netloader.Server) -> None:
    mine = {name: torch.empty_like(tensor) for name, tensor in WEIGHTS.items()}
    await netloader.pull(mine, IDENTITY, sources=[server.address], relay=relay)
    await pulls_everything(relay)


@pytest.mark.asyncio
@pytest.mark.usefixtures("leaves_nothing")
async def test_a_server_is_entered_in_one_task_and_left_in_another() -> None:
    async def enter() -> netloader.Server:
        return await netloader.Server(WEIGHTS, IDENTITY, host="127.0.0.1").__aenter__()

    async def leave(running: netloader.Server) -> None:
        await running.__aexit__(None, None, None)

    running = await asyncio.create_task(enter())
    await asyncio.create_task(pulls_everything(running))
    await asyncio.create_task(leave(running))
    with pytest.raises(netloader.NetloaderError):
        await netloader.probe(running.address)
