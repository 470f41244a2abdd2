"""Engines with unusable sources, and a seed that dies while engines pull. The tests depend on each other and share it.

The seed reads its weight files and holds in the middle of each transfer over `held`. An engine that falls back has the
files too, and has to give the same answers as the seed.
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
from tests.e2e.scenario import HELD, Scenario, environment_with_plugins
from tests.models import PROMPTS, ModelStore

pytestmark = [pytest.mark.slow, pytest.mark.in_order]

CHANGED = "model.layers.3.mlp.down_proj.weight"


@dataclass
class Engines:
    """The engines of the scenario."""

    stage: Scenario
    seed: Engine
    answers: Any
    weights: clients.Weights

    @property
    def address(self) -> str:
        return self.seed.addresses()[0]

    def with_files(self, name: str, *sources: str, arguments: tuple[str, ...] = (), **settings: Any) -> Engine:
        """Start an engine that has the weight files and should not need them."""
        config = {**clients.source(*sources), **settings}
        return self.stage.start(
            name, self.stage.full, *arguments, environment=environment_with_plugins(), config=config, niceness=2
        )


@pytest.fixture(scope="module")
def scenario(models: ModelStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("trouble")
    full, bare = make_hosts(folder, models, "llama-blocks")
    with ExitStack() as stack:
        stage = Scenario(stack, folder, full, bare)
        seed = stage.held("seed", files=True, MODEL="tiny").wait_ready()  # as the others are served
        yield Engines(stage, seed, seed.answers(PROMPTS), clients.pull_all(seed.wait_addresses()[0]))


def test_unusable_sources_are_logged_with_their_reasons(scenario: Engines) -> None:
    with socket.socket() as bound:  # bound and not listening: no other process can take the port meanwhile
        bound.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{bound.getsockname()[1]}"
        named = scenario.with_files("named", closed, scenario.address, MODEL="another model")
        other = scenario.with_files("other", scenario.address, arguments=("--dtype", "float32"))
        engines.wait_all_ready(named, other)
    try:
        (line,) = named.lines("the default loader (auto) loads the target")
        assert f"{closed}: cannot be reached" in line
        assert scenario.address in line
        assert "model is 'tiny' at the server and 'another model' at the client" in line
        assert named.answers(PROMPTS) == scenario.answers

        (line,) = other.lines("the default loader (auto) loads the target")
        assert scenario.address in line
        assert "dtype is 'bfloat16' at the server and 'float32' at the client" in line
        assert len(other.complete(PROMPTS[0])) == 16
        for engine in (named, other):
            assert not engine.lines("target: pulled ")
    finally:
        named.close()
        other.close()


def test_engines_load_although_their_seed_is_killed_while_they_pull(scenario: Engines) -> None:
    """One has another source and keeps its verified blocks; one has none, and reads its files."""
    with clients.late_server(scenario.weights) as (late, go):
        # No relays: otherwise the seed would redirect the second client to the first.
        two = scenario.stage.held("two", scenario.address, late.address, WAIT=120, RELAY=False)
        alone = scenario.with_files("alone", scenario.address, **HELD, RELAY=False)
        scenario.stage.wait_held("seed", 2)
        assert not two.lines("target: pulled ")
        assert not alone.lines("the default loader (auto) loads")
        scenario.seed.kill()
        assert not listens(scenario.address)
        alone.wait_line("the default loader (auto) loads the target")
        go.set()
        engines.wait_all_ready(two, alone)
    try:
        kept, rest = (clients.given(two, one) for one in (scenario.address, late.address))
        assert kept >= 1
        assert kept + rest == scenario.weights.report.blocks, "what was verified is not pulled again"
        assert not two.lines("the default loader (auto) loads")
        assert two.answers(PROMPTS) == scenario.answers

        (line,) = alone.lines("the default loader (auto) loads the target")
        assert "could not pull" in line
        assert scenario.address in line
        assert not alone.lines("target: pulled ")
        assert alone.answers(PROMPTS) == scenario.answers
    finally:
        two.close()
        alone.close()


def test_one_changed_weight_at_the_seed_changes_the_answers(scenario: Engines) -> None:
    """Control: the comparison of answers fails when a single tensor differs."""
    changed = dict(scenario.weights.tensors)
    changed[CHANGED] = changed[CHANGED].flip(0).contiguous()
    assert not torch.equal(changed[CHANGED], scenario.weights.tensors[CHANGED])
    with sync.serve(changed, scenario.weights.identity, host="127.0.0.1") as server:
        client = scenario.stage.start(
            "control",
            scenario.stage.bare,
            environment=ASLEEP,
            config={**clients.source(server.address), "FALLBACK": False},
        ).wait_ready()
        assert client.lines("target: pulled ")
        answers = client.answers(PROMPTS)
        client.stop()
    assert [prompt for prompt in PROMPTS if answers[prompt] == scenario.answers[prompt]] == []
