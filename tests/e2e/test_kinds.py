"""Models whose weights vLLM rewrites after loading, and models with a draft model: pulled, and equal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from netloader.core.identity import Role
from tests.e2e import clients, engines
from tests.e2e.hosts import DRAFT, MODEL, make_hosts
from tests.models import PROMPTS, ModelStore

pytestmark = pytest.mark.slow

DRAFT_MODEL: dict[str, Any] = {"model": DRAFT, "method": "draft_model", "num_speculative_tokens": 3}
EAGLE: dict[str, Any] = {"model": DRAFT, "method": "eagle", "num_speculative_tokens": 2}
EAGLE_3: dict[str, Any] = {"model": DRAFT, "method": "eagle3", "num_speculative_tokens": 2}
MTP: dict[str, Any] = {"method": "mtp", "num_speculative_tokens": 1}


@pytest.mark.parametrize(
    ("kind", "settings", "carrier"),
    [
        pytest.param("llama-w8a8", {"INT8_CACHE": "dram"}, "shm", id="llama-w8a8"),
        pytest.param("qwen3-moe", {"TRANSPORT": ["gloo", "tcp"]}, "gloo", id="qwen3-moe by gloo"),
    ],
)
def test_weights_that_post_processing_rewrites_are_pulled_and_equal(
    kind: str, settings: dict[str, Any], carrier: str, models: ModelStore, tmp_path: Path
) -> None:
    full, bare = make_hosts(tmp_path, models, kind)
    assert_equal_answers(tmp_path, full, bare, settings)
    assert f" over {carrier}" in (tmp_path / "client.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "draft", "speculative"),
    [
        pytest.param("llama-bf16", "draft", DRAFT_MODEL, id="a draft model"),
        pytest.param("llama-bf16", "eagle", EAGLE, id="eagle without embeddings"),
        pytest.param("llama-bf16", "eagle3", EAGLE_3, id="eagle-3"),
        pytest.param("mimo", None, MTP, id="mtp"),
    ],
)
def test_a_draft_is_pulled_beside_its_target(
    kind: str, draft: str | None, speculative: dict[str, Any], models: ModelStore, tmp_path: Path
) -> None:
    """The server has answered requests before the client starts, so target and draft share their tensors by then."""
    full, bare = make_hosts(tmp_path, models, kind, draft=draft)
    speculate = f"--speculative-config={json.dumps(speculative)}"
    # The draft's folder is no name, and the client's has no weight files from which a fingerprint could be taken.
    named = {} if draft is None else {"DRAFT_MODEL": draft}
    assert_equal_answers(tmp_path, full, bare, named, speculate, roles=("target", "draft"))


def assert_equal_answers(
    folder: Path,
    full: Path,
    bare: Path,
    settings: dict[str, Any],
    *arguments: str,
    roles: Sequence[Role] = ("target",),
) -> None:
    """Start a server and a client, and check that the weights of these roles and the answers are equal."""
    with engines.engine(MODEL, folder / "server.log", *arguments, folder=full, config=settings or None) as server:
        answers = server.wait_ready().answers(PROMPTS)
        assert max(len({token.text for token in tokens}) for tokens in answers.values()) >= 8
        config = {**settings, **clients.source(server.wait_addresses()[0]), "FALLBACK": False}
        with engines.engine(MODEL, folder / "client.log", *arguments, folder=bare, config=config) as client:
            client.wait_ready()
            assert client.answers(PROMPTS) == answers
            for role in roles:  # a wrong draft would only be slower: it changes no answer
                assert client.lines(f"rank 0: {role}: pulled ")
                ours, theirs = (clients.pull_all(one.wait_addresses()[0], role=role) for one in (server, client))
                assert ours.equal(theirs.tensors)
