"""A live engine reloads by an HTTP request: from sources with the same or other weights, and from one that is killed.

The tests depend on each other and share two engines: one runs through all of them, the other has another checkpoint and
holds in the middle of each transfer over `held`. A library server has the first engine's own weights.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest

from netloader import sync
from tests.e2e import clients, engines
from tests.e2e.engines import Engine, EngineFailed, RequestLoop
from tests.e2e.hosts import listens, make_hosts
from tests.e2e.scenario import HELD, Scenario, environment_with_plugins
from tests.models import PROMPTS, ModelStore

pytestmark = [pytest.mark.slow, pytest.mark.in_order]

LONG = " ".join(PROMPTS * 4)
"""Longer than a block of vLLM's prefix cache."""

ASKED = (*PROMPTS, LONG)
KEPT = "the weights stay as they are"


@dataclass
class Engines:
    """The engines and servers of the scenario."""

    stage: Scenario
    live: Engine
    seed: Engine
    answers: Any
    others: Any
    weights: clients.Weights

    @property
    def seed_root(self) -> str:
        root: str = clients.probe(self.seed.addresses()[0])["root"]
        return root

    def tell(self, method: str, *arguments: str, timeout: float = 120.0, **more: Any) -> None:
        """Call a method of the live engine's worker, as vLLM's API for developers has it."""
        body = {"method": method, "args": list(arguments), "kwargs": more}
        self.live.post("/collective_rpc", body, timeout=timeout)

    def reload(self, source: str, *, transport: Sequence[str] = ("tcp",), **settings: Any) -> None:
        """Set a source of the live engine, and have it reload."""
        config = {**clients.source(source), **HELD, "TRANSPORT": list(transport), **settings}
        self.tell("update_config", overrides={"load_config": {"model_loader_extra_config": config}})
        self.tell("reload_weights", timeout=clients.PULL_TIMEOUT)

    def checksums(self) -> dict[str, str]:
        """vLLM's checksums of the live weights."""
        found: dict[str, str] = self.live.post("/weight_checker", {"action": "checksum"})["checksums"]
        return found

    def forget_prefixes(self) -> None:
        """Have vLLM drop its prefix cache, which was computed with the previous weights."""
        assert self.live.post("/reset_prefix_cache", {}) == {"success": True}

    def fresh_answers(self) -> Any:
        """The live engine's answers without its prefix cache, which some CPUs round otherwise."""
        self.forget_prefixes()
        return self.live.answers(ASKED)

    def serves_its_own(self) -> bool:
        """Whether the live engine's server has the weights that the engine started with."""
        return clients.pull_all(self.live.addresses()[0]).equal(self.weights.tensors)


@pytest.fixture(scope="module")
def scenario(models: ModelStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    folder = tmp_path_factory.mktemp("reload")
    full, bare = make_hosts(folder / "ours", models, "llama-blocks")
    theirs, _ = make_hosts(folder / "theirs", models, "llama-blocks-other")
    with ExitStack() as stack:
        stage = Scenario(stack, folder, full, bare)
        live = stage.start(
            "live",
            full,
            environment=environment_with_plugins(VLLM_SERVER_DEV_MODE="1"),
            config={"TRANSPORT": HELD["TRANSPORT"]},
            niceness=2,
        )
        seed = Scenario(stack, folder, theirs, bare).held("seed", files=True)
        engines.wait_all_ready(live, seed)
        answers, others = live.answers(ASKED), seed.answers(ASKED)
        assert [prompt for prompt in ASKED if answers[prompt] == others[prompt]] == []
        seed.wait_addresses()
        yield Engines(stage, live, seed, answers, others, clients.pull_all(live.wait_addresses()[0]))


def test_sleep_has_no_effect_on_a_cpu_and_the_weights_stay_served(scenario: Engines) -> None:
    scenario.live.post("/sleep", {})
    try:
        assert scenario.live.lines("sleep mode is not supported on CPU")
        assert scenario.serves_its_own()
    finally:
        scenario.live.post("/wake_up", {})
    assert not scenario.live.lines("serves its target no more")
    assert scenario.fresh_answers() == scenario.answers


def test_an_engine_with_damaged_weights_reloads_them_from_another_engine(scenario: Engines) -> None:
    before = scenario.checksums()
    scenario.live.post("/weight_checker", {"action": "reset"})
    assert scenario.live.lines("serves its target no more: the weights are about to change (reset_weights)")
    assert scenario.checksums() != before
    assert scenario.live.complete(PROMPTS[0]) != scenario.answers[PROMPTS[0]]
    with sync.serve(scenario.weights.tensors, scenario.weights.identity, host="127.0.0.1") as neighbour:
        scenario.reload(neighbour.address)
    (line,) = scenario.live.lines("reloaded, root")
    assert scenario.weights.report.root in line
    assert scenario.checksums() == before
    assert scenario.fresh_answers() == scenario.answers
    assert scenario.serves_its_own()


def test_other_weights_are_refused_and_the_engine_goes_on(scenario: Engines) -> None:
    with pytest.raises(EngineFailed, match=KEPT):
        scenario.reload(scenario.seed.addresses()[0])
    (line,) = scenario.live.lines(f"netloader: rank 0: {KEPT}")
    found, wanted = (
        clients.probe(one.addresses()[0])["identity"]["fingerprint"] for one in (scenario.seed, scenario.live)
    )
    assert f"fingerprint is '{found}' at the server and '{wanted}' at the client" in line
    assert scenario.fresh_answers() == scenario.answers
    assert scenario.serves_its_own()


def test_other_weights_whose_root_is_expected_are_loaded_and_served(scenario: Engines) -> None:
    scenario.reload(scenario.seed.addresses()[0], EXPECT_ROOT=scenario.seed_root)
    assert len(scenario.live.lines("reloaded, root")) == 2
    assert scenario.live.complete(LONG) != scenario.others[LONG], (
        "what vLLM has cached of it was computed by the old weights"
    )
    scenario.forget_prefixes()
    assert scenario.fresh_answers() == scenario.others
    assert clients.probe(scenario.live.addresses()[0])["root"] == scenario.seed_root
    with sync.serve(scenario.weights.tensors, scenario.weights.identity, host="127.0.0.1") as neighbour:
        scenario.reload(neighbour.address, EXPECT_ROOT=scenario.weights.report.root)
    scenario.forget_prefixes()
    assert scenario.fresh_answers() == scenario.answers
    assert scenario.serves_its_own()


@dataclass
class _InThread:
    """A reload in a thread."""

    scenario: Engines
    settings: dict[str, Any]
    errors: list[str] = field(default_factory=list)

    def __enter__(self) -> _InThread:
        self._thread = threading.Thread(target=self._run, name="reload")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self.scenario.reload(**self.settings)
        except EngineFailed as error:
            self.errors.append(str(error))


def test_a_source_killed_during_a_reload_leaves_the_weights_unchanged(scenario: Engines) -> None:
    address, root = scenario.seed.addresses()[0], scenario.seed_root
    settings = {"source": address, "transport": HELD["TRANSPORT"], "EXPECT_ROOT": root}
    with _InThread(scenario, settings) as reload:
        scenario.stage.wait_held("seed", 1)
        assert not reload.errors
        assert scenario.serves_its_own(), "nothing is retracted before everything is there"
        with RequestLoop(scenario.live, PROMPTS[0]) as loop:  # vLLM answers when the call has ended
            scenario.seed.kill()
            loop.wait_requests(3)
    assert not loop.errors
    assert loop.answers == {scenario.live.complete(PROMPTS[0], loop.tokens)}
    assert not listens(address)
    (error,) = reload.errors
    assert KEPT in error
    assert address in scenario.live.lines(f"netloader: rank 0: {KEPT}")[-1]
    assert len(scenario.live.lines("reloaded, root")) == 3
    assert scenario.fresh_answers() == scenario.answers
    assert scenario.serves_its_own()
