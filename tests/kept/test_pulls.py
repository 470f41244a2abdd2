"""The decisions of a pull: what the client does with sources of all kinds is what it did in release 0.1."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from tests.kept import records
from tests.kept.pulling import trace_of
from tests.kept.scenarios import SCENARIOS

RECORD = records.load("pulls") if (records.HERE / "pulls.json").exists() else {}


def record() -> dict[str, Any]:
    return {name: anyio.run(trace_of, scenario) for name, scenario in SCENARIOS.items()}


def test_every_scenario_is_recorded() -> None:
    assert list(RECORD) == list(SCENARIOS), "python -m tests.kept.records pulls"


@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_pull_does_what_it_did(name: str) -> None:
    assert records.differences("pulls", await trace_of(SCENARIOS[name]), RECORD[name]) == ""
