"""Fixtures for tests that drive vLLM's loading path in this process."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.models import ModelStore
from tests.vllm import harness, processors
from tests.vllm.pulls import LogLines, Seeds


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """Tiny checkpoints, each made once per session."""
    return ModelStore(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def needs_vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM with the distributed state of a single worker, set up once per session."""
    from netloader.vllm.plugin import register

    register()
    with harness.distributed(tmp_path_factory.mktemp("distributed")):
        yield


@pytest.fixture(scope="session")
def seeds(needs_vllm: None, models: ModelStore, tmp_path_factory: pytest.TempPathFactory) -> Seeds:
    """Models that can be served, each loaded once per session."""
    return Seeds(models, tmp_path_factory.mktemp("changed"))


@pytest.fixture
def processor(request: pytest.FixtureRequest, needs_vllm: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kind of processor that vLLM chooses kernels for: see `tests.vllm.processors`."""
    kind: str = request.param
    processors.choose(kind, monkeypatch)
    return kind


@pytest.fixture(autouse=True)
def no_server_left() -> Iterator[None]:
    """End the process's server after each test."""
    from netloader.vllm.serve import serving

    yield
    serving.stop_server()


@pytest.fixture
def log_lines() -> Iterator[LogLines]:
    """What this library logs during the test."""
    handler = LogLines()
    logger = logging.getLogger("netloader")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
