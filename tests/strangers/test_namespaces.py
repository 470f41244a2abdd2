"""What strangers do to a client, between hosts: processes in network namespaces, every kind alone and all together.

A client has to begin within 2 s, and to end within 3 times its quiet time, whatever strangers hold at the server: with
and without a token, from another host and from the client's own address. The table of results is printed (``-s``).
It needs root and iproute2, and takes some minutes: ``make strangers``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hosts import Host, hosts, why_not
from netloader.checkpoint import make_demo_checkpoint
from tests.commands import no_traceback, serving
from tests.strangers.kinds import KINDS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

MBIT = 400
BYTES = 96 << 20
FILES = 1024
BEGIN = 2.0
RATIO = 3.0
SETTLE = 2.5
"""Seconds that strangers have been there when the client comes."""

ALL = ";".join(KINDS)


class Agent:
    """A process of `tests.strangers.agent` on a host."""

    def __init__(self, host: Host) -> None:
        self._process = subprocess.Popen(
            host.command(sys.executable, "-m", "tests.strangers.agent"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *order: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(" ".join(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def agent(host: Host) -> Iterator[Agent]:
    one = Agent(host)
    try:
        yield one
    finally:
        one.close()


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        told: The attempts that failed, and the seconds of the phases.
    """

    token: str
    where: str
    strangers: str
    begin: float
    end: float
    ratio: float
    told: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"| {self.token:8} | {self.where:11} | {self.strangers:29} | {self.begin:9.2f} | {self.ratio:17.2f} |"


HEAD = f"| {'token':8} | {'from':11} | {'strangers':29} | begin [s] | end / quiet time |\n|---|---|---|---|---|"


class Place:
    """A server, a client, and agents for strangers, on three hosts.

    Attributes:
        quiet: Seconds that a pull takes when nobody else is there.
    """

    def __init__(self, address: str, token: str, client: Agent, agents: dict[str, Agent]) -> None:
        self.client = client
        self.agents = agents
        self.token = token
        self._address = address
        quiet = min((self.pull() for _ in range(3)), key=lambda one: float(one["end"]))
        self.quiet, self._root = float(quiet["end"]), quiet["root"]
        self.results = [Result("with" if token else "without", "", "none", quiet["begin"], self.quiet, 1.0)]

    def pull(self) -> Any:
        answer = self.client.ask("pull", self._address, self.token)
        assert "error" not in answer, answer
        return answer

    def measure(self, where: str, title: str, names: str) -> Result:
        strange = self.agents[where]
        strange.ask("strangers", self._address, names)
        try:
            time.sleep(SETTLE)
            answer = self.pull()
        finally:
            strange.ask("stop")
        assert answer["root"] == self._root
        end = answer["end"]
        token = "with" if self.token else "without"
        self.results.append(Result(token, where, title, answer["begin"], end, end / self.quiet, tuple(answer["told"])))
        return self.results[-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strangers") / "model"
    make_demo_checkpoint(folder, BYTES)
    return folder


@pytest.fixture(scope="module", params=["", "open sesame, please"], ids=["no token", "token"])
def place(request: pytest.FixtureRequest, model: Path) -> Iterator[Place]:
    options: list[object] = []
    if request.param:
        secret = model.parent / "token"
        secret.write_text(request.param)
        secret.chmod(0o600)
        options = ["--token-file", secret]
    with hosts([MBIT] * 3) as (server_host, client_host, other_host), ExitStack() as stack:
        client, beside = stack.enter_context(agent(client_host)), stack.enter_context(agent(client_host))
        agents = {"other host": stack.enter_context(agent(other_host)), "own address": beside}
        within = server_host.command("prlimit", f"--nofile={FILES}")
        with serving(model, *options, host=server_host.address, within=within) as server:
            found = Place(server.address, request.param, client, agents)
            yield found
            server.process.terminate()
            told = server.read_to_end()
    print("\n" + "\n".join(map(str, (HEAD, *found.results))))
    assert no_traceback(told), told


@pytest.mark.parametrize("title", [*KINDS, "all together"])
@pytest.mark.parametrize("where", ["other host", "own address"])
def test_a_client_begins_and_ends_in_time_whatever_strangers_hold(place: Place, where: str, title: str) -> None:
    if place.token and title in KINDS and KINDS[title].secret:
        pytest.skip("strangers without the token cannot do this")
    result = place.measure(where, title, ";".join(KINDS) if title == "all together" else title)
    assert result.begin <= BEGIN, result
    assert result.ratio <= RATIO, result
