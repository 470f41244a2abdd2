"""Every kind of model loads in the real worker, and the table in the documentation is what became of its tensors."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ascend import table
from tests.ascend.kinds import KINDS, Store
from tests.ascend.outcomes import SURVIVES
from tests.ascend.processes import Engine, EngineFailed, surveyed
from tests.preloaded import PYTHON

Loads = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def loads(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Loads:
    """Loads a kind of model from its files, in a process of its own, once."""
    return functools.cache(lambda name: surveyed(name, store, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def page() -> str:
    return table.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", KINDS)
def test_the_real_worker_loads_it(loads: Loads, name: str) -> None:
    found = loads(name)
    assert found["worker"] == "vllm_ascend.worker.worker.NPUWorker"
    assert found["runner"] == "vllm_ascend.worker.model_runner_v1.NPUModelRunner"
    assert found["roles"] == (["target", "draft"] if name in {"mtp", "eagle"} else ["target"])
    touched = {row["method"] for row in found["rows"] if row["outcome"] != SURVIVES}
    assert set(KINDS[name].schemes) <= touched
    assert any(row["layer"].startswith("Ascend") for row in found["rows"])


@pytest.mark.parametrize("name", KINDS)
def test_the_table_says_what_became_of_its_tensors(loads: Loads, page: str, name: str) -> None:
    written = table.sections(page).get(KINDS[name].title)
    assert written == table.section(name, loads(name)["rows"]), "python -m tests.ascend.table writes it anew"


def test_the_table_names_its_releases_and_no_other_kinds(page: str) -> None:
    assert table.versions() in page
    assert list(table.sections(page)) == [kind.title for kind in KINDS.values()]


def test_a_fresh_process_loads_the_same(store: Store, tmp_path: Path) -> None:
    """The other processes are forked from one that has imported models and applied vllm-ascend's patches."""
    found: list[dict[str, Any]] = []
    for python in (sys.executable, PYTHON):
        folder = tmp_path / str(len(found))
        folder.mkdir()
        with Engine(0, folder, python=python) as engine:
            found.append(engine.load("load", store.get("deepseek-w8a8"), {}))
    assert found[0] == found[1]


def test_a_model_without_a_tensor_does_not_load(store: Store, tmp_path: Path) -> None:
    """Control: a process that fails says so."""
    with Engine(0, tmp_path) as engine, pytest.raises(EngineFailed, match="Cannot find any model weights"):
        engine.load("survey", store.bare("w8a8"), {})
