"""A live engine is told over HTTP to reload: from neighbours with its weights or others, and from one that dies.

Two engines, told in order: one lives on through all of it, the other has another checkpoint and stops in the middle of
each transfer over `held`. The first one's own weights are served by the library.
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
from tests.e2e.stage import HELD, Stage, plugged
from tests.models import PROMPTS, ModelStore

pytestmark = [pytest.mark.slow, pytest.mark.in_order]

LONG = " ".join(PROMPTS * 4)
"""Longer than a block of vLLM's prefix cache."""

ASKED = (*PROMPTS, LONG)
KEPT = "the weights stay as they are"


@dataclass
class Cast:
    """Who plays."""

    stage: Stage
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
        """Name a source to the live engine, and have it reload."""
        config = {**clients.source(source), **HELD, "TRANSPORT": list(transport), **settings}
        self.tell("update_config", overrides={"load_config": {"model_loader_extra_config": config}})
        self.tell("reload_weights", timeout=clients.PULL_TIMEOUT)

    def checksums(self) -> dict[str, str]:
        """vLLM's own over the live weights."""
        found: dict[str, str] = self.live.post("/weight_checker", {"action": "checksum"})["checksums"]
        return found

    def forget_prefixes(self) -> None:
        """Have vLLM drop what it computed by the weights that it had."""
        assert self.live.post("/reset_prefix_cache", {}) == {"success": True}

    def serves_its_own(self) -> bool:
        """Whether the live engine's server gives what the engine began with."""
        return clients.pull_all(self.live.addresses()[0]).equal(self.weights.tensors)


@pytest.fixture(scope="module")
def cast(models: ModelStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cast]:
    folder = tmp_path_factory.mktemp("reload")
    full, bare = make_hosts(folder / "ours", models, "llama-blocks")
    theirs, _ = make_hosts(folder / "theirs", models, "llama-blocks-other")
    with ExitStack() as stack:
        stage = Stage(stack, folder, full, bare)
        live = stage.start(
            "live",
            full,
            environment=plugged(VLLM_SERVER_DEV_MODE="1"),
            config={"TRANSPORT": HELD["TRANSPORT"]},
            niceness=2,
        )
        seed = Stage(stack, folder, theirs, bare).held("seed", files=True)
        engines.wait_all_ready(live, seed)
        answers, others = live.answers(ASKED), seed.answers(ASKED)
        assert [prompt for prompt in ASKED if answers[prompt] == others[prompt]] == []
        seed.wait_addresses()
        yield Cast(stage, live, seed, answers, others, clients.pull_all(live.wait_addresses()[0]))


def test_sleep_does_nothing_on_a_cpu_and_is_not_taken_for_more(cast: Cast) -> None:
    cast.live.post("/sleep", {})
    try:
        assert cast.live.lines("sleep mode is not supported on CPU")
        assert cast.serves_its_own()
    finally:
        cast.live.post("/wake_up", {})
    assert not cast.live.lines("serves its target no more")
    assert cast.live.answers(ASKED) == cast.answers


def test_a_damaged_engine_is_repaired_by_a_neighbour(cast: Cast) -> None:
    before = cast.checksums()
    cast.live.post("/weight_checker", {"action": "reset"})
    assert cast.live.lines("serves its target no more: the weights are about to change (reset_weights)")
    assert cast.checksums() != before
    assert cast.live.complete(PROMPTS[0]) != cast.answers[PROMPTS[0]]
    with sync.serve(cast.weights.tensors, cast.weights.identity, host="127.0.0.1") as neighbour:
        cast.reload(neighbour.address)
    (line,) = cast.live.lines("reloaded, root")
    assert cast.weights.report.root in line
    assert cast.checksums() == before
    assert cast.live.answers(ASKED) == cast.answers
    assert cast.serves_its_own()


def test_other_weights_are_refused_and_the_engine_goes_on(cast: Cast) -> None:
    with pytest.raises(EngineFailed, match=KEPT):
        cast.reload(cast.seed.addresses()[0])
    (line,) = cast.live.lines(f"netloader: rank 0: {KEPT}")
    found, wanted = (clients.probe(one.addresses()[0])["identity"]["fingerprint"] for one in (cast.seed, cast.live))
    assert f"fingerprint is '{found}' at the server and '{wanted}' at the client" in line
    assert cast.live.answers(ASKED) == cast.answers
    assert cast.serves_its_own()


def test_other_weights_that_are_named_are_taken_and_served(cast: Cast) -> None:
    cast.reload(cast.seed.addresses()[0], EXPECT_ROOT=cast.seed_root)
    assert len(cast.live.lines("reloaded, root")) == 2
    assert cast.live.complete(LONG) != cast.others[LONG], "what vLLM has cached of it was computed by the old weights"
    cast.forget_prefixes()
    assert cast.live.answers(ASKED) == cast.others
    assert clients.probe(cast.live.addresses()[0])["root"] == cast.seed_root
    with sync.serve(cast.weights.tensors, cast.weights.identity, host="127.0.0.1") as neighbour:
        cast.reload(neighbour.address, EXPECT_ROOT=cast.weights.report.root)
    cast.forget_prefixes()
    assert cast.live.answers(ASKED) == cast.answers
    assert cast.serves_its_own()


@dataclass
class _InThread:
    """A reload that goes on while the test looks at it."""

    cast: Cast
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
            self.cast.reload(**self.settings)
        except EngineFailed as error:
            self.errors.append(str(error))


def test_a_source_that_is_killed_half_way_changes_nothing(cast: Cast) -> None:
    address, root = cast.seed.addresses()[0], cast.seed_root
    settings = {"source": address, "transport": HELD["TRANSPORT"], "EXPECT_ROOT": root}
    with _InThread(cast, settings) as reload:
        cast.stage.wait_held("seed", 1)
        assert not reload.errors
        assert cast.serves_its_own(), "nothing is retracted before everything is there"
        with RequestLoop(cast.live, PROMPTS[0]) as loop:  # vLLM answers when the call is over
            cast.seed.kill()
            loop.wait_requests(3)
    assert not loop.errors
    assert loop.answers == {cast.live.complete(PROMPTS[0], loop.tokens)}
    assert not listens(address)
    (error,) = reload.errors
    assert KEPT in error
    assert address in cast.live.lines(f"netloader: rank 0: {KEPT}")[-1]
    assert len(cast.live.lines("reloaded, root")) == 3
    assert cast.live.answers(ASKED) == cast.answers
    assert cast.serves_its_own()
