"""Tensors are freed when their owner drops them, without a garbage collection: after pulls, failures and serving."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from collections.abc import Iterator

import pytest
import torch

import netloader
from netloader import sync
from netloader.core.addresses import Address
from netloader.errors import NetloaderError
from netloader.observe import Event, SourceLeft

WEIGHTS = {"w": torch.arange(10_000), "v": torch.ones(10)}
PULLS = 50

Reference = weakref.ref[torch.Tensor]


@pytest.fixture(autouse=True)
def no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def nobody() -> str:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return f"127.0.0.1:{closed.getsockname()[1]}"


def fresh() -> dict[str, torch.Tensor]:
    return {name: torch.empty_like(tensor) for name, tensor in WEIGHTS.items()}


def refer(tensors: dict[str, torch.Tensor]) -> list[Reference]:
    return [weakref.ref(tensor) for tensor in tensors.values()]


def alive(references: list[Reference]) -> int:
    assert references
    return sum(reference() is not None for reference in references)


async def pull(source: Address | str, transport: str, **options: object) -> list[Reference]:
    tensors = fresh()
    references = refer(tensors)
    await netloader.pull(tensors, sources=[source], transport=transport, **options)  # type: ignore[arg-type]
    return references


async def pull_new(source: Address, transport: str) -> list[Reference]:
    tensors, _ = await netloader.pull_new(sources=[source], transport=transport)
    return refer(dict(tensors))


@pytest.mark.parametrize("transport", ["memory", "tcp", "shm"])
async def test_pulled_tensors_are_freed(transport: str) -> None:
    references = []
    async with netloader.Server(WEIGHTS, host="127.0.0.1", transport=transport) as server:
        for _ in range(PULLS // 2):
            references += await pull(server.address, transport)
            references += await pull_new(server.address, transport)
    assert len(references) == PULLS * len(WEIGHTS)
    assert alive(references) == 0


@pytest.mark.parametrize(
    "options", [{"expect_root": "0" * 64}, {"timeout": 1e-6}, {"identity": netloader.ModelIdentity(model="other")}]
)
async def test_tensors_of_a_pull_that_failed_are_freed(options: dict[str, object]) -> None:
    references: list[Reference] = []

    async def fail(source: Address) -> None:
        tensors = fresh()
        references.extend(refer(tensors))
        await netloader.pull(tensors, sources=[source], transport="memory", **options)  # type: ignore[arg-type]

    async with netloader.Server(WEIGHTS, host="127.0.0.1", transport="memory") as server:
        for _ in range(5):
            with pytest.raises(NetloaderError):
                await fail(server.address)
            # Once the error is dropped, its traceback and the frames in it are freed: nothing there is a cycle.
            assert alive(references) == 0


async def test_tensors_of_a_pull_without_a_source_are_freed(nobody: str) -> None:
    references: list[Reference] = []

    async def fail() -> None:
        tensors = fresh()
        references.extend(refer(tensors))
        await netloader.pull(tensors, sources=[nobody], transport="memory")

    with pytest.raises(NetloaderError):
        await fail()
    assert alive(references) == 0


async def test_tensors_of_a_pull_whose_progress_failed_are_freed() -> None:
    references: list[Reference] = []

    def broken(_: object) -> None:
        raise ZeroDivisionError

    async def fail(source: Address) -> None:
        tensors = fresh()
        references.extend(refer(tensors))
        await netloader.pull(tensors, sources=[source], transport="memory", progress=broken)

    async with netloader.Server(WEIGHTS, host="127.0.0.1", transport="memory") as server:
        with pytest.raises(ZeroDivisionError):
            await fail(server.address)
    assert alive(references) == 0


async def test_tensors_of_a_cancelled_pull_are_freed(nobody: str) -> None:
    references: list[Reference] = []
    waits = asyncio.Event()

    def watch(event: Event) -> None:
        if isinstance(event, SourceLeft):
            waits.set()

    async def wait() -> None:
        tensors = fresh()
        references.extend(refer(tensors))
        await netloader.pull(tensors, sources=[nobody], transport="memory", wait=60, observers=[watch])

    task = asyncio.create_task(wait())
    await waits.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    await asyncio.sleep(0)  # the event loop runs this step with the task that woke it as its argument
    assert alive(references) == 0


async def test_served_tensors_are_freed_after_retracting_and_after_the_end() -> None:
    references: list[Reference] = []
    async with netloader.Server(host="127.0.0.1", transport="memory") as server:
        for _ in range(5):
            await server.hold(dict(fresh()))
            await pull_new(server.address, "memory")
            await server.retract(reason="its tensors are dropped")
        held = fresh()
        references = refer(held)
        await server.hold(held)
        del held
        await pull_new(server.address, "memory")
        assert alive(references) == len(references), "what is served is kept"
        await server.retract(reason="its tensors are dropped")
        assert alive(references) == 0
        last = fresh()
        references = refer(last)
        await server.hold(last)
        del last
        await pull_new(server.address, "memory")
    assert alive(references) == 0


async def test_tensors_of_a_server_that_failed_to_start_are_freed() -> None:
    references: list[Reference] = []

    async def fail() -> None:
        tensors = fresh()
        references.extend(refer(tensors))
        await netloader.Server({**tensors, "no": torch.zeros(1).to_sparse()}, transport="memory").__aenter__()

    with pytest.raises(NetloaderError):
        await fail()
    assert alive(references) == 0


def test_the_blocking_side_frees_them_too(nobody: str) -> None:
    references: list[Reference] = []

    def good(source: Address) -> None:
        tensors = fresh()
        references.extend(refer(tensors))
        sync.pull(tensors, sources=[source])
        new, _ = sync.pull_new(sources=[source])
        references.extend(refer(dict(new)))

    def bad() -> None:
        tensors = fresh()
        references.extend(refer(tensors))
        sync.pull(tensors, sources=[nobody])

    served = fresh()
    references.extend(refer(served))
    with sync.serve(served, host="127.0.0.1", transport=["memory", "tcp"]) as server:
        for _ in range(5):
            good(server.address)
            with pytest.raises(NetloaderError):
                bad()
    del served, server
    assert alive(references) == 0
