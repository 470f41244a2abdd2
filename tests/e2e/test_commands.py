"""The commands of the documents, as a reader pastes them: in an empty folder, with only what is in capitals replaced.

Both engines run on one host. So the second one gets another folder, another `--port` and another `LISTEN_PORT`, as
docs/vllm.md says.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e import engines
from tests.e2e.engines import Engine
from tests.models import PROMPTS, ModelStore

ROOT = Path(__file__).resolve().parents[2]
NAME = "tiny"
FIRST, SECOND = "10.0.0.7", "10.0.0.8"
"""The hosts in the documents."""

LISTEN_PORT = "19374"
TOKEN_FILE = "/etc/netloader.token"

WITHIN = 120.0
"""Seconds: imports of vLLM on a busy machine, and far less than a start."""


def commands(page: str) -> tuple[str, ...]:
    """The first two commands `vllm serve` of a page, as they are in it."""
    found = re.findall(r"^vllm serve .*?(?=\n```)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return tuple(found[:2])


@dataclass(frozen=True)
class Pasted:
    """What replaces the names and addresses of the documents.

    Attributes:
        folder: For logs; the commands run in an empty folder in it.
        token_file: Where the secret is.
        ports: For each host of the documents, the port at which its worker listens.
    """

    folder: Path
    token_file: Path
    ports: dict[str, int]

    def start(
        self, command: str, model: Path, log: str, *, old: str = "", new: str = "", **environment: str
    ) -> AbstractContextManager[Engine]:
        """Start a command of the documents through a shell, with `old` replaced by `new`, and with `--port`."""
        assert old in command
        text = command.replace(old, new) if old else command
        text = text.replace("MODEL", str(model), 1).replace("NAME", NAME).replace(TOKEN_FILE, str(self.token_file))
        for host, port in self.ports.items():
            text = text.replace(f"{host}:{LISTEN_PORT}", f"127.0.0.1:{port}")
            text = re.sub(rf'"{host}",(\s*"LISTEN_PORT": ){LISTEN_PORT}', rf'"127.0.0.1",\g<1>{port}', text)
        assert "10.0.0." not in text
        assert LISTEN_PORT not in text
        empty = self.folder / f"{log}-here"
        empty.mkdir()
        port = engines.free_port()
        shell = ["sh", "-c", f"exec {text} --port {port}"]
        file = self.folder / f"{log}.log"
        return engines.launched(shell, file, port=port, name=NAME, environment=environment, folder=empty)


@pytest.fixture(scope="module")
def pasted(tmp_path_factory: pytest.TempPathFactory) -> Pasted:
    folder = tmp_path_factory.mktemp("commands")
    token_file = folder / "netloader.token"
    token_file.write_text("0123456789abcdef" * 4 + "\n", encoding="ascii")  # as `openssl rand -hex 32` writes it
    token_file.chmod(0o600)
    return Pasted(folder, token_file, {host: engines.free_port() for host in (FIRST, SECOND)})


@pytest.fixture(scope="module")
def server(pasted: Pasted, models: ModelStore) -> Iterator[Engine]:
    """The first command, ready."""
    first, _ = commands("docs/vllm.md")
    with ExitStack() as stack:
        started = stack.enter_context(pasted.start(first, models.get("llama-bf16"), "server"))
        yield started.wait_ready()


def summaries(engine: Engine) -> list[str]:
    """The lines of an engine that sum up a load of its target."""
    return [line for line in engine.lines("netloader: rank 0: target: ") if re.search("target: (pulled|loaded) ", line)]


def test_the_readme_has_the_commands_of_the_page_about_vllm() -> None:
    assert commands("README.md") == commands("docs/vllm.md")


def test_the_two_commands_work_as_pasted(pasted: Pasted, server: Engine, models: ModelStore) -> None:
    _, second = commands("docs/vllm.md")
    server.stand_back()
    with pasted.start(second, models.bare("llama-bf16"), "client") as client:
        client.wait_ready()
        for engine, host, how in ((server, FIRST, "loaded "), (client, SECOND, "pulled ")):
            (line,) = summaries(engine)
            assert f"target: {how}" in line
            assert len(engine.lines("netloader: pulled ")) == 0, "nothing repeats the summary"
            assert " INFO " in line
            assert engine.wait_addresses() == {0: f"127.0.0.1:{pasted.ports[host]}"}
            assert not engine.lines("netloader serves at"), "a token is set, so nothing warns of strangers"
            ours = engine.lines("netloader")
            assert not [line for line in ours if " ERROR " in line or " WARNING " in line]
        assert f" of {NAME} (target, " in summaries(client)[0]
        assert f" from 127.0.0.1:{pasted.ports[FIRST]} over " in summaries(client)[0]
        assert not client.lines("the default loader (auto) loads")
        assert client.answers(PROMPTS) == server.answers(PROMPTS)


def test_a_client_without_the_name_is_refused_by_name_and_told_what_to_set(
    pasted: Pasted, server: Engine, models: ModelStore
) -> None:
    """It has no weight files either, so its start ends."""
    _, second = commands("docs/vllm.md")
    without = "--served-model-name NAME"
    with pasted.start(second, models.bare("llama-bf16"), "unnamed", old=without, new="--enforce-eager") as client:
        assert client.wait_ended() != 0
        (line,) = client.lines("the default loader (auto) loads the target: could not pull")
        assert f"model is '{NAME}' at the server and '{models.bare('llama-bf16')}' at the client" in line
        assert "the server has its name from its --served-model-name" in line
        assert "the client from its path, which is no name" in line
        assert "set MODEL to one name on both sides" in line
        assert client.lines("Cannot find any model weights")
        assert not summaries(client)


def test_a_wrong_path_of_the_configuration_ends_the_start_with_the_reason(pasted: Pasted, models: ModelStore) -> None:
    first, _ = commands("docs/vllm.md")
    began = time.monotonic()
    wrong = '"CONFIG_FILE": "/absent/netloader.json", "TOKEN_FILE"'
    with pasted.start(first, models.get("llama-bf16"), "wrong", old='"TOKEN_FILE"', new=wrong) as engine:
        assert engine.wait_ended() != 0
        assert time.monotonic() - began < WITHIN
        last = engine.text().rstrip().splitlines()[-1]
        assert "CONFIG_FILE = '/absent/netloader.json'" in last
        assert len(engine.members()) == 0
