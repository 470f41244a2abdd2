"""A server that listens beyond loopback without a token says so in one line that names the remedy."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import netloader
from netloader.cli.serve import _CommandServer
from netloader.config import load_config
from netloader.core.identity import ModelIdentity
from netloader.tensors import hold
from netloader.vllm.serve import serving

PART = "to every host that can reach it, because no token is set"
SECRET = b"0123456789abcdef"


@pytest.fixture
def no_server_left() -> Iterator[None]:
    yield
    serving.stop_server()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and PART in r.getMessage()]


def weights() -> dict[str, torch.Tensor]:
    return {"w": torch.zeros(4)}


async def test_the_library_warns_once_when_it_begins_to_serve(caplog: pytest.LogCaptureFixture) -> None:
    async with netloader.Server(transport="tcp") as server:
        assert not warnings(caplog), "nothing is served yet"
        await server.hold(weights(), ModelIdentity(model="m"))
        await server.hold(weights(), ModelIdentity(model="m", role="draft"))
    (line,) = warnings(caplog)
    assert line.startswith("netloader serves at [::]:")
    assert "(pass token=..., or a host=... that only trusted hosts reach)" in line


@pytest.mark.parametrize("arguments", [{"host": "127.0.0.1"}, {"host": "localhost"}, {"token": SECRET}])
async def test_on_loopback_or_with_a_token_there_is_no_warning(
    arguments: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with netloader.Server(weights(), transport="tcp", **arguments):
        pass
    assert not warnings(caplog)


@pytest.mark.usefixtures("no_server_left")
def test_a_worker_names_its_own_settings_once(caplog: pytest.LogCaptureFixture) -> None:
    server = serving.worker_server(load_config({"TRANSPORT": "memory"}), 0, "cpu")
    assert server is not None
    for role in serving.ROLES:
        server.offer(hold(weights(), ModelIdentity(model="m", role=role)), "a test")
    (line,) = warnings(caplog)
    assert "(set TOKEN_FILE on both sides, or LISTEN_HOST to an address that only trusted hosts reach)" in line


async def test_the_command_names_its_own_options(caplog: pytest.LogCaptureFixture) -> None:
    async with _CommandServer(weights(), transport="tcp"):
        pass
    (line,) = warnings(caplog)
    assert "(give --token-file on both sides, or a --host that only trusted hosts reach)" in line


@pytest.mark.parametrize("page", ["README.md", "docs/vllm.md", "docs/configuration.md"])
def test_the_first_commands_of_the_documents_have_a_name_an_address_and_a_token(page: str) -> None:
    text = (Path(__file__).parents[3] / page).read_text(encoding="utf-8")
    commands = re.findall(r"^vllm serve .*?(?=^```)", text, re.MULTILINE | re.DOTALL)
    first = commands[: 1 if page.endswith("configuration.md") else 2]
    assert first
    for command in first:
        assert "--served-model-name NAME" in command
        (inline,) = re.findall(r"--model-loader-extra-config '([^']+)'", command)
        fields = json.loads(inline)
        assert {"LISTEN_HOST", "TOKEN_FILE"} <= fields.keys()
        del fields["TOKEN_FILE"]  # of the reader's machine
        load_config(fields)
