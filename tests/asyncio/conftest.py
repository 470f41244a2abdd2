"""The event loops of these tests, and what a test must not leave behind.

The tests use netloader as a project of its users does: by its public names, with plain asyncio and pytest-asyncio.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
import uvloop

from tests import guards


def eager_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    if sys.version_info >= (3, 12):
        loop.set_task_factory(asyncio.eager_task_factory)
    return loop


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
if sys.version_info >= (3, 12):
    LOOPS["eager"] = eager_loop  # without it, a test that asks for this loop is skipped


torch.set_num_threads(1)  # its threads wait for each other, and other checks of `make test` use the processors

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as first:
    first.get_loop()  # for its first event loop, libuv opens a pipe that it keeps


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests run in asyncio's own loop, unless their mark asks for others: ``asyncio(loop_factories=[...])``."""
    mark = item.get_closest_marker("asyncio")
    return LOOPS if mark is not None and "loop_factories" in mark.kwargs else {"asyncio": LOOPS["asyncio"]}


@pytest.fixture
def leaves_nothing() -> Iterator[None]:
    """Fail when threads or file descriptors of the test are left after its event loop was closed."""
    threads, descriptors = threading.enumerate(), guards.descriptors()
    yield
    deadline = time.monotonic() + guards.GRACE
    for thread in threading.enumerate():
        if thread not in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
    left = [thread for thread in threading.enumerate() if thread not in threads]
    if left:
        pytest.fail(f"threads left behind:\n{guards.stacks(left)}", pytrace=False)
    open_still = guards.new_descriptors(descriptors)
    if open_still:
        pytest.fail(f"descriptors left open: {open_still}", pytrace=False)
