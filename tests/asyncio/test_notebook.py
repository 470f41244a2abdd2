"""A loop that runs already, as in a notebook: each cell is a task of it, and blocking calls are made inside it."""

from __future__ import annotations

import ast
import asyncio
import inspect
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import netloader

WEIGHTS = {"w": torch.randn(300, 200), "b": torch.zeros(7, dtype=torch.float16)}
IDENTITY = netloader.ModelIdentity(model="notebook")

pytestmark = pytest.mark.usefixtures("leaves_nothing")


class Notebook:
    """Runs cells one after the other in one event loop and one namespace, as IPython's kernel does."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._names: dict[str, Any] = {"netloader": netloader, "torch": torch, "weights": WEIGHTS, "identity": IDENTITY}

    def run(self, cell: str) -> None:
        code = compile(inspect.cleandoc(cell), "<cell>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

        async def as_a_task() -> None:
            waiting = types.FunctionType(code, self._names)()
            if inspect.iscoroutine(waiting):
                await waiting

        self._runner.run(as_a_task())


@pytest.fixture
def notebook() -> Iterator[Notebook]:
    with asyncio.Runner() as runner:
        yield Notebook(runner)


def test_a_server_that_is_entered_in_one_cell_and_left_in_another(notebook: Notebook) -> None:
    notebook.run(
        """
        from contextlib import AsyncExitStack

        stack = AsyncExitStack()
        server = await stack.enter_async_context(netloader.Server(weights, identity, host="127.0.0.1"))
        """
    )
    notebook.run(
        """
        mine = {name: torch.empty_like(tensor) for name, tensor in weights.items()}
        report = await netloader.pull(mine, identity, sources=[server.address])
        assert all(torch.equal(mine[name], weights[name]) for name in weights)
        """
    )
    notebook.run("await stack.aclose()")


def test_blocking_calls_in_a_running_loop(notebook: Notebook) -> None:
    notebook.run(
        """
        with netloader.sync.serve(weights, identity, host="127.0.0.1") as server:
            assert netloader.sync.probe(server.address).announcement.identity.model == "notebook"
            tensors, report = netloader.sync.pull_new(sources=[server.address])
            mine = {name: torch.empty_like(tensor) for name, tensor in weights.items()}
            await netloader.pull(mine, identity, sources=[server.address])
        assert all(torch.equal(tensors[name], weights[name]) for name in weights)
        assert all(torch.equal(mine[name], weights[name]) for name in weights)
        """
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("call", ["pull", "pull_new", "probe"])
def test_a_blocking_call_to_a_server_of_the_loop_that_it_blocks_is_refused(
    notebook: Notebook, call: str, host: str
) -> None:
    arguments = {
        "pull": "weights, sources=['127.0.0.1:9', source]",
        "pull_new": "sources=[netloader.Source(netloader.parse_address(source))]",
        "probe": "source",
    }[call]
    notebook.run("server = await netloader.Server(weights, identity, host='127.0.0.1').__aenter__()")
    notebook.run(f"source = f'{host}:{{server.port}}'")
    with pytest.raises(netloader.LocalProtocolError, match="is a server of the event loop that") as caught:
        notebook.run(f"netloader.sync.{call}({arguments})")
    assert f"await netloader.{call}(...)" in caught.value.hint
    assert "netloader.sync.serve(...)" in caught.value.hint

    notebook.run("await server.__aexit__(None, None, None)")
    with pytest.raises(netloader.NetloaderError, match="refused"):  # by the operating system: no server listens there
        notebook.run(f"netloader.sync.{call}({arguments})")


def test_a_blocking_call_in_a_callback_of_the_loop_is_refused_too(notebook: Notebook) -> None:
    notebook.run(
        """
        import asyncio

        def call():
            try:
                netloader.sync.probe(server.address)
            except netloader.NetloaderError as error:
                found.set_result(error)

        async with netloader.Server(weights, identity, host="127.0.0.1") as server:
            found = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(call)
            assert "is a server of the event loop that" in str(await found)
        """
    )


def test_a_blocking_call_in_a_thread_asks_a_server_of_the_loop(notebook: Notebook) -> None:
    notebook.run(
        """
        import asyncio

        async with netloader.Server(weights, identity, host="127.0.0.1") as server:
            tensors, report = await asyncio.to_thread(netloader.sync.pull_new, sources=[server.address])
        assert all(torch.equal(tensors[name], weights[name]) for name in weights)
        """
    )


@pytest.fixture
def other() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


async def started() -> netloader.Server:
    return await netloader.Server(WEIGHTS, IDENTITY, host="127.0.0.1").__aenter__()


async def left(server: netloader.Server) -> None:
    async with asyncio.timeout(30):
        await server.__aexit__(None, None, None)


async def holds_more(server: netloader.Server) -> None:
    await server.hold({"more": torch.zeros(3)}, netloader.ModelIdentity(model="notebook", role="draft"))


async def retracts(server: netloader.Server) -> None:
    await server.retract(reason="a test")


@pytest.mark.parametrize("use", [left, holds_more, retracts])
def test_a_server_is_used_in_its_own_loop_only(other: asyncio.Runner, use: Any) -> None:
    with asyncio.Runner() as runner:
        server = runner.run(started())
        with pytest.raises(netloader.LocalProtocolError, match="another event loop") as caught:
            other.run(use(server))
        assert "loop_scope" in caught.value.hint
        runner.run(use(server))
        if use is not left:
            runner.run(left(server))


def test_a_server_that_is_left_after_its_loop_ended(other: asyncio.Runner) -> None:
    with asyncio.Runner() as runner:
        server = runner.run(started())
    with pytest.raises(netloader.LocalProtocolError, match="closed"):
        other.run(left(server))


def test_a_server_whose_task_was_cancelled_does_not_say_that_its_user_was(other: asyncio.Runner) -> None:
    async def cancels() -> None:
        before = asyncio.all_tasks()
        server = await started()
        async with asyncio.timeout(30):
            while ours := {task for task in asyncio.all_tasks() - before if task.get_name() == "the server"}:
                for task in ours:
                    task.cancel()
                await asyncio.wait(ours)
        with pytest.raises(netloader.LocalProtocolError, match="ended before"):
            await holds_more(server)
        with pytest.raises(netloader.LocalProtocolError, match="its task was cancelled"):
            await left(server)

    other.run(cancels())
