"""An error at the command line names what the user typed."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

import pytest

from netloader.cli import main
from netloader.cli.arguments import make_parser
from netloader.cli.console import in_words_of
from tests.cases.files import save, tensors


@pytest.mark.parametrize(
    ("arguments", "text", "shown"),
    [
        (["serve", "m"], "LISTEN_PORT = 1 is taken", "--port = 1 is taken"),
        (["serve", "m"], "raise MAX_CLIENTS on the server", "raise --max-clients on the server"),
        (["pull", "a:1", "-o", "o"], "raise TIMEOUT", "raise --timeout"),
        (["pull", "a:1", "-o", "o"], "no WAIT, no STALL_TIMEOUT", "no --wait, no --stall-timeout"),
        (["pull", "a:1", "-o", "o"], "by EXPECT_ROOT; TOKEN_FILE", "by --expect-root; --token-file"),
        (["pull", "a:1", "-o", "o"], "set MODEL on both sides", "set --model on both sides"),
        (["pull", "a:1", "-o", "o"], "set KEEP_RAW on both sides", "set KEEP_RAW on both sides"),
        (["probe", "a:1"], "set WAIT; TIMEOUT", "set WAIT; --timeout"),
        (["probe", "a:1"], "SOURCE, WAITING, MY_TIMEOUT", "SOURCE, WAITING, MY_TIMEOUT"),
        (["config", "check", "{}"], "WAIT = -1", "WAIT = -1"),
    ],
)
def test_a_field_is_called_as_the_option_of_the_command_where_it_has_one(
    arguments: list[str], text: str, shown: str
) -> None:
    options: argparse.Namespace = make_parser().parse_args(arguments)
    assert in_words_of(options, text) == shown


def test_a_port_in_use_is_called_port(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, "model.safetensors", tensors("a"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tmp_path), "--host", "127.0.0.1", "--port", port]) == 2
    said = capsys.readouterr().err
    assert "netloader: error: --port = " in said
    assert "LISTEN_PORT" not in said


def test_a_pull_that_is_too_slow_says_which_option_to_raise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert main(["pull", f"127.0.0.1:{port}", "-o", str(tmp_path / "out"), "--timeout", "0.1"]) == 1
    said = capsys.readouterr().err
    assert "--timeout" in said
    assert "TIMEOUT" not in said
