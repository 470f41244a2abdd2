"""Engines that meet sources they cannot use, and a source that dies while engines pull: told in order, over one seed.

The seed reads its weight files and stops in the middle of each transfer over `held`. Whoever falls back has the files
too, and has to answer as the seed does.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from netloader import sync
from tests.e2e import clients, engines
from tests.e2e.engines import Engine
from tests.e2e.hosts import ASLEEP, listens, make_hosts
from tests.e2e.stage import HELD, Stage, plugged
from tests.models import PROMPTS, ModelStore

pytestmark = [pytest.mark.slow, pytest.mark.in_order]

CHANGED = "model.layers.3.mlp.down_proj.weight"


@dataclass
class Cast:
    """Who plays."""

    stage: Stage
    seed: Engine
    answers: Any
    weights: clients.Weights

    @property
    def address(self) -> str:
        return self.seed.addresses()[0]

    def with_files(self, name: str, *sources: str, arguments: tuple[str, ...] = (), **settings: Any) -> Engine:
        """Start an engine that has the weight files and shall not need them."""
        config = {**clients.source(*sources), **settings}
        return self.stage.start(name, self.stage.full, *arguments, environment=plugged(), config=config, niceness=2)


@pytest.fixture(scope="module")
def cast(models: ModelStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cast]:
    folder = tmp_path_factory.mktemp("trouble")
    full, bare = make_hosts(folder, models, "llama-blocks")
    with ExitStack() as stack:
        stage = Stage(stack, folder, full, bare)
        seed = stage.held("seed", files=True).wait_ready()
        yield Cast(stage, seed, seed.answers(PROMPTS), clients.pull_all(seed.wait_addresses()[0]))


def test_sources_that_cannot_be_used_are_named_with_their_reasons(cast: Cast) -> None:
    with socket.socket() as bound:  # bound and not listening: nobody else gets the port meanwhile
        bound.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{bound.getsockname()[1]}"
        named = cast.with_files("named", closed, cast.address, MODEL="another model")
        other = cast.with_files("other", cast.address, arguments=("--dtype", "float32"))
        engines.wait_all_ready(named, other)
    try:
        (line,) = named.lines("the default loader (auto) loads the target")
        assert f"{closed} cannot be reached" in line
        assert cast.address in line
        assert "model is 'model' at the server and 'another model' at the client" in line
        assert named.answers(PROMPTS) == cast.answers

        (line,) = other.lines("the default loader (auto) loads the target")
        assert cast.address in line
        assert "dtype is 'bfloat16' at the server and 'float32' at the client" in line
        assert len(other.complete(PROMPTS[0])) == 16
        for engine in (named, other):
            assert not engine.lines("target: pulled ")
    finally:
        named.close()
        other.close()


def test_engines_outlive_a_seed_that_is_killed_while_they_pull(cast: Cast) -> None:
    """One has another source and keeps what it verified; one has none, and reads its files."""
    with clients.late_server(cast.weights) as (late, go):
        # No relays: the seed would send whoever comes second to the first.
        two = cast.stage.held("two", cast.address, late.address, WAIT=120, RELAY=False)
        alone = cast.with_files("alone", cast.address, **HELD, RELAY=False)
        cast.stage.wait_held("seed", 2)
        assert not two.lines("target: pulled ")
        assert not alone.lines("the default loader (auto) loads")
        cast.seed.kill()
        assert not listens(cast.address)
        alone.wait_line("the default loader (auto) loads the target")
        go.set()
        engines.wait_all_ready(two, alone)
    try:
        kept, rest = (clients.given(two, one) for one in (cast.address, late.address))
        assert kept >= 1
        assert kept + rest == cast.weights.report.blocks, "what was verified is not pulled again"
        assert not two.lines("the default loader (auto) loads")
        assert two.answers(PROMPTS) == cast.answers

        (line,) = alone.lines("the default loader (auto) loads the target")
        assert "could not pull" in line
        assert cast.address in line
        assert not alone.lines("target: pulled ")
        assert alone.answers(PROMPTS) == cast.answers
    finally:
        two.close()
        alone.close()


def test_one_other_weight_at_the_seed_shows_in_the_answers(cast: Cast) -> None:
    """The control: the comparison of the stories turns red when a single tensor is another one."""
    changed = dict(cast.weights.tensors)
    changed[CHANGED] = changed[CHANGED].flip(0).contiguous()
    assert not torch.equal(changed[CHANGED], cast.weights.tensors[CHANGED])
    with sync.serve(changed, cast.weights.identity, host="127.0.0.1") as server:
        client = cast.stage.start(
            "control", cast.stage.bare, environment=ASLEEP, config={**clients.source(server.address), "FALLBACK": False}
        ).wait_ready()
        assert client.lines("target: pulled ")
        answers = client.answers(PROMPTS)
        client.stop()
    assert [prompt for prompt in PROMPTS if answers[prompt] == cast.answers[prompt]] == []
