"""A chain of engines in tests that depend on each other: each pulls from the previous one, and keeps running after it.

The first one reads the weight files; the others start from folders without any, so they compute with
pulled weights only. The control, that the comparison fails when one weight differs, is
tests/vllm/test_pull.py::test_one_changed_weight_at_the_seed_is_one_changed_weight_at_the_client.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from netloader.errors import NoSourceLeft
from tests.e2e import clients, engines
from tests.e2e.engines import Engine, RequestLoop, wait_for
from tests.e2e.hosts import ASLEEP, MODEL, listens, make_hosts
from tests.e2e.scenario import Scenario
from tests.models import PROMPTS, ModelStore

BASELINE = 60
ROUNDS = 3
STOP_WITHIN = 2.0

pytestmark = pytest.mark.in_order


@pytest.fixture(scope="module")
def scenario(models: ModelStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    folder = tmp_path_factory.mktemp("story")
    full, bare = make_hosts(folder, models, "llama-blocks")
    with ExitStack() as stack:
        yield Scenario(stack, folder, full, bare)


@pytest.fixture(scope="module")
def server(scenario: Scenario) -> Engine:
    """The server of the guide, unchanged."""
    server = scenario.start("server", scenario.full, environment=ASLEEP, small=False).wait_ready()
    scenario.answers = server.answers(PROMPTS)
    with RequestLoop(server, PROMPTS[0]) as loop:
        loop.wait_requests(BASELINE)
    assert not loop.errors
    scenario.quiet = loop.pauses
    return server


@dataclass(frozen=True)
class Joined:
    """Two engines that pulled from the server while it answered requests."""

    client: Engine
    middle: Engine
    loop: RequestLoop


@pytest.fixture(scope="module")
def joined(scenario: Scenario, server: Engine) -> Joined:
    """The client of the guide, unchanged, and a second one whose server can be held in the middle of a transfer."""
    address = server.wait_addresses()[0]
    server.stand_back()
    with RequestLoop(server, PROMPTS[0], think=0.5) as loop:
        client = scenario.start(
            "client", scenario.bare, environment=ASLEEP, small=False, config=clients.source(address), niceness=2
        )
        middle = scenario.held("middle", address)
        engines.wait_all_ready(client, middle)
    return Joined(client, middle, loop)


@pytest.fixture(scope="module")
def weights(server: Engine) -> clients.Weights:
    return clients.pull_all(server.addresses()[0])


def test_a_server_without_a_source_logs_one_line_about_the_default_loader(server: Engine) -> None:
    (line,) = server.lines("the default loader (auto) loads the target")
    assert "SOURCE" in line


def test_the_server_answers_requests_while_clients_pull(server: Engine, figure: Callable[[str], None]) -> None:
    address = server.wait_addresses()[0]
    for _ in range(ROUNDS):  # other load on the machine may make one round useless
        with RequestLoop(server, PROMPTS[0]) as quiet:
            quiet.wait_requests(BASELINE)
        pulls = 0
        with RequestLoop(server, PROMPTS[0]) as busy:
            while len(busy.pauses) < BASELINE and not busy.errors:
                clients.pull_all(address)
                pulls += 1
        figure(
            f"longest pause of {len(quiet.pauses)} requests without a client {quiet.longest():.3f} s, "
            f"of {len(busy.pauses)} during {pulls} pulls of 51 MB {busy.longest():.3f} s"
        )
        assert not quiet.errors
        assert not busy.errors
        assert quiet.answers == busy.answers
        if busy.longest() < 5 * quiet.longest():
            return
    pytest.fail(f"in none of {ROUNDS} rounds was the longest pause below 5 times the one without a client")


def test_the_client_of_the_guide_computes_the_same_as_its_server(
    scenario: Scenario, server: Engine, joined: Joined
) -> None:
    assert not list((scenario.bare / MODEL).glob("*.safetensors*")), "the client must have no weight file to read"
    assert joined.client.lines("netloader: rank 0: target: pulled ")
    assert not joined.client.lines("the default loader (auto) loads")
    roots = [clients.probe(engine.wait_addresses()[0])["root"] for engine in (server, joined.client, joined.middle)]
    assert roots[0] == roots[1] == roots[2]
    assert joined.client.answers(PROMPTS) == scenario.answers
    for tokens in scenario.answers.values():
        assert len({token.text for token in tokens}) >= 8, "a model that repeats itself would prove nothing"
        assert len(tokens) == 16
        assert all(len(token.top) >= 5 for token in tokens)


@pytest.mark.slow
def test_the_server_answers_requests_while_engines_start_and_pull(
    scenario: Scenario, joined: Joined, figure: Callable[[str], None]
) -> None:
    # The time of an answer while engines start depends on the number of processors: it is printed, not checked.
    figure(
        f"longest pause of {len(scenario.quiet)} requests without a client {max(scenario.quiet):.3f} s, "
        f"of {len(joined.loop.pauses)} while two engines start and pull {joined.loop.longest():.3f} s"
    )
    assert not joined.loop.errors
    assert len(joined.loop.answers) == 1


def test_an_engine_that_pulled_serves_other_clients(joined: Joined, weights: clients.Weights) -> None:
    again = clients.pull_all(joined.client.addresses()[0])
    assert again.equal(weights.tensors)
    assert again.report.root == weights.report.root


@pytest.fixture(scope="module")
def idle_stop(server: Engine, joined: Joined, weights: clients.Weights) -> float:
    """Stop the first server, which gets no further request; return the seconds that vLLM takes."""
    return server.stop()


def test_an_idle_engine_stops_cleanly(server: Engine, idle_stop: float, figure: Callable[[str], None]) -> None:
    figure(f"SIGTERM to the end of all processes, nobody connected: {idle_stop:.2f} s")
    assert server.process.returncode == 0
    assert not listens(server.addresses()[0])


@pytest.mark.slow
def test_three_transfers_complete_after_their_server_is_stopped(
    scenario: Scenario, joined: Joined, weights: clients.Weights, idle_stop: float, figure: Callable[[str], None]
) -> None:
    middle = joined.middle
    address = middle.wait_addresses()[0]
    file = scenario.folder / "middle-rank0.txt"
    assert file.read_text(encoding="ascii") == address
    with clients.late_server(weights) as (other, go):
        seed = scenario.seed = scenario.held("seed", address, other.address, WAIT=120)
        assert middle.answers(PROMPTS) == scenario.answers
        scenario.wait_held("middle", 1)
        with (
            clients.LibraryPull(weights, [address], [clients.held_transport()]) as alone,
            clients.LibraryPull(weights, [address, other.address], [clients.held_transport(), "tcp"], wait=120) as two,
            RequestLoop(middle, PROMPTS[0]) as loop,
        ):
            scenario.wait_held("middle", 3)
            wait_for(lambda: alone.in_the_middle and two.in_the_middle, 30, "two library clients in the middle")
            loop.wait_requests(20)
            assert not loop.errors
            assert clients.probe(address)["root"] == weights.report.root
            assert len(open_transfers(middle)) == 3
            assert alone.in_the_middle
            assert two.in_the_middle
            assert not seed.lines("target: pulled ")
            loop.end()
            figure(f"longest pause of {len(loop.pauses)} requests, three clients held: {loop.longest():.3f} s")
            seconds = middle.stop()
            figure(f"SIGTERM to the end of all processes, three clients in the middle: {seconds:.2f} s")
            assert not listens(address)
            wait_for(lambda: not file.exists(), 30, "the end of the address file")
            assert middle.process.returncode == 0
            # The shutdown of vLLM itself takes longer on a loaded machine.
            assert seconds < idle_stop + STOP_WITHIN
            wait_for(lambda: alone.over, 30, "the end of a pull whose only source is gone")
            assert isinstance(alone.error, NoSourceLeft)
            go.set()
        assert two.complete, two.error
        assert two.report is not None
        kept, rest = (two.report.sources[one].blocks for one in (address, other.address))
        assert kept >= 1
        assert kept + rest == weights.report.blocks, "what was verified is not pulled again"
        seed.wait_ready()
    kept, rest = (clients.given(seed, one) for one in (address, other.address))
    assert kept >= 1
    assert kept + rest == weights.report.blocks
    assert not seed.lines("the default loader (auto) loads")
    assert seed.answers(PROMPTS) == scenario.answers


@pytest.mark.slow
def test_a_client_completes_after_its_server_is_killed(scenario: Scenario, weights: clients.Weights) -> None:
    seed = scenario.seed
    assert seed is not None, "the test above starts it"
    address = seed.wait_addresses()[0]
    file = scenario.folder / "seed-rank0.txt"
    assert file.read_text(encoding="ascii") == address
    with (
        clients.late_server(weights) as (other, go),
        clients.LibraryPull(weights, [address, other.address], [clients.held_transport(), "tcp"], wait=120) as pull,
    ):
        scenario.wait_held("seed", 1)
        wait_for(lambda: pull.in_the_middle, 30, "a library client in the middle")
        seed.kill()
        go.set()
    assert pull.complete, pull.error
    assert pull.report is not None
    kept, rest = (pull.report.sources[one].blocks for one in (address, other.address))
    assert kept >= 1
    assert kept + rest == weights.report.blocks
    assert not listens(address)
    wait_for(lambda: not file.exists(), 30, "the end of the address file")


def open_transfers(engine: Engine) -> set[str]:
    """The sessions of an engine's server that are in TRANSFER, by its log."""
    begun = set(re.findall(r"(session \d+) with \S+: TRANSFER over", engine.text()))
    return begun - set(re.findall(r"(session \d+) with \S+(?:: done|, after \d+ blocks)", engine.text()))
