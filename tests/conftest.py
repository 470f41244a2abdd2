"""What every test runs under: Hypothesis profiles, asyncio in debug mode, and the guards of `tests.guards`."""

from __future__ import annotations

import asyncio.constants
import gc
import importlib.util
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from netloader.server.admission import Admission
from tests import guards
from tests.loops import DebugLoop
from tests.preloaded import Keeper

HERE = Path(__file__).parent
NEEDS_VLLM = ("vllm", "e2e")
HAVE_VLLM = importlib.util.find_spec("vllm") is not None

# tests/asyncio is a project of its own, with pytest-asyncio: `make test` runs it in a process of its own.
collect_ignore = ["asyncio", *(() if HAVE_VLLM else NEEDS_VLLM)]

# No profile has a deadline: this is no place to measure time. `ci` repeats itself; `deep` is for the night.
settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True, print_blob=True)
settings.register_profile(
    "deep", max_examples=5000, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


def pytest_report_header() -> list[str]:
    profile = os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
    lines = [f"hypothesis profile: {profile}"]
    if not HAVE_VLLM:
        lines.append("vLLM is not installed: tests/vllm and tests/e2e are left out (make e2e runs them)")
    return lines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for folder in NEEDS_VLLM:
            if item.path.is_relative_to(HERE / folder):
                item.add_marker(folder)


def pytest_collection_finish() -> None:
    # What is imported by now stays: without this, every full collection walks through all of torch.
    gc.freeze()


def pytest_sessionfinish() -> None:
    # Some of vLLM's libraries look at the process's end whether all of theirs was collected.
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """A job in the background ignores Ctrl-C, and would hand that on to the processes that tests start."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def preloaded_processes(ctrl_c_is_heard: None) -> Iterator[Keeper]:
    """Forks, for tests that start processes, one that has loaded torch: see `tests.preloaded`."""
    keeper = Keeper()
    with pytest.MonkeyPatch.context() as patch:
        keeper.replace_fork(patch.setattr)
        if "PYTEST_XDIST_WORKER" in os.environ:
            keeper.start()  # a part of all tests needs it sooner or later
        yield keeper
    keeper.close()


@pytest.fixture(scope="session")
def anyio_backend() -> Iterator[tuple[str, dict[str, Any]]]:
    with pytest.MonkeyPatch.context() as patch:
        # Debug mode notes where each call was scheduled: ten frames are a tenth of the time, one is enough.
        patch.setattr(asyncio.constants, "DEBUG_STACK_DEPTH", 1)
        yield "asyncio", {"debug": True, "loop_factory": DebugLoop}


@pytest.fixture(scope="session")
def blocking_guard() -> guards.BlockingGuard:
    return guards.BlockingGuard()


@pytest.fixture(autouse=True)
def no_blocking_calls(request: pytest.FixtureRequest, blocking_guard: guards.BlockingGuard) -> Iterator[None]:
    """Fail on a blocking call made inside a running event loop."""
    if request.node.get_closest_marker("allow_blocking") is not None:
        yield
        return
    with blocking_guard as guard:
        guard.calls.clear()
        yield
    if guard.calls:
        pytest.fail("\n".join(guard.calls), pytrace=False)


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    """Fail when a `netloader-...` thread that the test started still runs after it."""
    before = threading.enumerate()
    yield
    left = guards.own_threads(besides=before)
    if left:
        pytest.fail(f"threads left behind:\n{guards.stacks(left)}", pytrace=False)


@pytest.fixture
def turns_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns of clients that move nothing do not pass on. For tests that hold a turn while other clients wait."""
    monkeypatch.setattr(Admission, "pass_on", lambda *_: [])
    monkeypatch.setattr(Admission, "overdue", lambda *_: None)


@pytest.fixture
def no_leaked_descriptors(preloaded_processes: Keeper) -> Iterator[None]:
    """Fail when the test leaves file descriptors open. For tests that ask for it by name."""
    if not preloaded_processes.started:  # its socket stays open
        preloaded_processes.start()
    threads = threading.enumerate()
    before = guards.descriptors()
    yield
    guards.own_threads(besides=threads)
    left = guards.new_descriptors(before)
    if left:
        where = guards.stacks(threading.enumerate())
        pytest.fail(f"descriptors left open: {left}\nthreads:\n{where}", pytrace=False)
