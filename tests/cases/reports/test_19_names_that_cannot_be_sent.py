"""A text that no peer would accept is refused before anything is served or pulled, and the refusal names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import netloader
from netloader.cli import main
from netloader.config import load_config
from netloader.core.identity import ModelIdentity, check_sendable
from netloader.errors import ConfigError
from netloader.tensors import hold
from tests.cases.files import save, tensors

NAMES = ["\udcff", "m" * 100_000]


def weights() -> dict[str, torch.Tensor]:
    return {"w": torch.zeros(4)}


@pytest.mark.parametrize("name", NAMES, ids=["half a surrogate pair", "100,000 characters"])
@pytest.mark.parametrize("field", ["model", "names", "engine"])
def test_a_holding_with_a_name_that_no_peer_accepts_is_refused_before_it_is_served(name: str, field: str) -> None:
    value: Any = {"served": name} if field == "names" else name
    identity = msgspec.structs.replace(ModelIdentity(), **{field: value})
    with pytest.raises(ConfigError, match=field.upper()) as caught:
        hold(weights(), identity)
    assert caught.value.field == field.upper()
    assert len(str(caught.value)) < 600, "a text of 100,000 characters is not shown in full"


@pytest.mark.parametrize("name", NAMES, ids=["half a surrogate pair", "100,000 characters"])
async def test_serving_and_pulling_under_such_a_name_are_refused_at_once(name: str) -> None:
    identity = ModelIdentity(model=name)
    with pytest.raises(ConfigError, match="MODEL"):
        async with netloader.Server(weights(), identity, host="127.0.0.1"):
            pass
    with pytest.raises(ConfigError, match="MODEL"):
        await netloader.pull(weights(), identity, sources=["127.0.0.1:9"])
    with pytest.raises(ConfigError, match="MODEL"):
        await netloader.probe("127.0.0.1:9", identity)


@pytest.mark.parametrize("field", ["MODEL", "DRAFT_MODEL"])
@pytest.mark.parametrize("name", NAMES, ids=["half a surrogate pair", "100,000 characters"])
def test_the_configuration_refuses_such_a_name(field: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field} = "):
        load_config({field: name})


def test_names_at_the_limit_can_be_sent() -> None:
    check_sendable(ModelIdentity(model="m" * 4096, engine="e" * 256, names={"MODEL": "m" * 4096}))


@pytest.mark.parametrize(
    ("name", "reason"),
    list(zip(NAMES, ["lone surrogates", "it has 100000 characters"], strict=True)),
    ids=["half", "long"],
)
def test_the_command_line_refuses_such_a_name_before_it_reads_a_file(
    name: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, "model.safetensors", tensors("a"))
    assert main(["serve", str(tmp_path), "--host", "127.0.0.1", "--model", name]) == 2
    said = capsys.readouterr().err
    assert "netloader: error: --model = " in said
    assert reason in said
    assert "hashed" not in said
