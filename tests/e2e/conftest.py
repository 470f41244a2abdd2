"""Fixtures for scenarios with complete engines: models, and figures that are printed after a run."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest

from tests.models import ModelStore

FIGURES: pytest.StashKey[list[str]] = pytest.StashKey()
BROKEN: pytest.StashKey[str] = pytest.StashKey()
"""On a module: the test at which its story ended."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Remember the failed test of a scenario whose tests depend on each other."""
    report = yield
    if report.failed and item.get_closest_marker("in_order") is not None and item.parent is not None:
        item.parent.stash.setdefault(BROKEN, item.name)
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the other tests of a failed scenario: its engines are not in the state that they expect."""
    if item.get_closest_marker("in_order") is not None and item.parent is not None:
        broken = item.parent.stash.get(BROKEN, None)
        if broken is not None:
            pytest.fail(f"the story ended at {broken}", pytrace=False)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """Tiny checkpoints, each made once per session."""
    return ModelStore(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def figure(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Keep a line that is printed at the end of the run."""
    return pytestconfig.stash.setdefault(FIGURES, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(FIGURES, [])
    if lines:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.write_line(line)
