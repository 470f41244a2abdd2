"""One line sums up a load, whether it was pulled or not; and a wrong configuration is found before anything starts."""

from __future__ import annotations

import pytest

from netloader.errors import ConfigError
from tests.models import ModelStore
from tests.vllm import harness
from tests.vllm.pulls import LogLines, Seeds, offered, pull, source_of

pytestmark = pytest.mark.usefixtures("needs_vllm")


def test_one_line_sums_up_a_pull(seeds: Seeds, models: ModelStore, log_lines: LogLines) -> None:
    seed = seeds.get("llama-bf16")
    log_lines.lines.clear()
    with source_of(seed.holding) as source:
        pull(models.bare("llama-bf16"), source)
    line = log_lines.one("pulled ")
    assert line.startswith("netloader: rank 0: target: pulled ")
    assert len(line) <= 300
    assert line.count(source) == 1
    assert f"root {seed.holding.announcement.root}" in line
    assert f" from {source} over memory" in line
    assert "MB/s" in line
    assert not log_lines.with_part("phases:"), "details are at debug level"


def test_the_line_has_the_name_of_the_model_and_not_a_path_of_another_host(
    models: ModelStore, log_lines: LogLines
) -> None:
    named = {"served_model_name": "small"}
    _, holding = offered(models.get("llama-bf16"), {"MODEL": None}, named)
    assert log_lines.with_part("serving small (target, raw)")
    log_lines.lines.clear()
    with source_of(holding) as source:
        pull(models.bare("llama-bf16"), source, arguments=named, MODEL=None)
    assert " of small (target, " in log_lines.one("pulled ")
    assert not log_lines.with_part(str(models.get("llama-bf16")))


def test_one_line_sums_up_a_load_from_storage(models: ModelStore, log_lines: LogLines) -> None:
    pull(models.get("llama-bf16"), "127.0.0.1:1")
    line = log_lines.one("rank 0: target: loaded ")
    assert " MB from storage (auto) in " in line
    assert "; not pulled: could not pull: " in line
    assert "127.0.0.1:1" in line


def test_a_wrong_path_of_the_configuration_ends_the_start_before_a_worker_is_started(
    models: ModelStore, log_lines: LogLines
) -> None:
    with pytest.raises(ConfigError, match="CONFIG_FILE"):
        harness.engine_config(
            models.get("llama-bf16"), load_format="netloader", extra={"CONFIG_FILE": "/absent/netloader.json"}
        )
    assert log_lines.one("netloader: CONFIG_FILE = ")
