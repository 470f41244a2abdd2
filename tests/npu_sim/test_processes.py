"""The scenarios of `tests.hccl.scenarios` between processes with simulated devices."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hccl import scenarios
from tests.hccl.processes import ROOT, clean_environment


@pytest.fixture
def simulated() -> dict[str, str]:
    fakes = Path(__file__).parent / "fakes"
    return clean_environment({"PYTHONPATH": os.pathsep.join([str(fakes), str(ROOT)])})


def test_receivers_that_die_do_not_disturb_the_seed(simulated: dict[str, str]) -> None:
    scenarios.receivers_that_die_cost_the_seed_nothing(simulated)


def test_no_channel_is_opened_while_memory_is_measured(simulated: dict[str, str]) -> None:
    scenarios.nothing_is_opened_while_memory_is_measured(simulated)


def test_a_lost_seed_is_an_error_at_the_receiver(simulated: dict[str, str]) -> None:
    scenarios.a_lost_seed_is_an_error(simulated)
