"""A model's name that no peer may be sent is refused when serving starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from netloader import ModelIdentity, sync
from netloader.cli import main
from netloader.errors import ConfigError
from tests.cases.files import save, tensors

NAMES = [("bad\udc80name", "lone surrogates"), ("x" * 100_000, "it has 100000 characters")]


@pytest.mark.parametrize(("name", "reason"), NAMES)
def test_the_command_line_refuses_it_before_it_reads_a_file(
    name: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, "model.safetensors", tensors("a"))
    assert main(["serve", str(tmp_path), "--host", "127.0.0.1", "--model", name]) == 2
    said = capsys.readouterr().err
    assert "netloader: error: --model = " in said
    assert reason in said
    assert "hashed" not in said


@pytest.mark.parametrize(("name", "reason"), NAMES)
def test_the_library_refuses_it(name: str, reason: str) -> None:
    with (
        pytest.raises(ConfigError, match=reason),
        sync.serve(tensors("a"), ModelIdentity(model=name), host="127.0.0.1", transport="tcp"),
    ):
        pass
