"""The pace of what costs time: a burst, and then so many seconds each on average."""

from __future__ import annotations

from netloader.server.pace import Pace


def test_a_burst_is_free_and_then_each_one_costs_its_seconds() -> None:
    pace = Pace(burst=0.5)
    for _ in range(50):
        assert pace.wait(100.0) == 0.0
        pace.spend(0.01, 100.0)
    pace.spend(0.01, 100.0)
    assert round(pace.wait(100.0), 6) == 0.01
    assert pace.wait(100.02) == 0.0


def test_what_was_not_spent_for_long_adds_up_to_the_burst_only() -> None:
    pace = Pace(burst=0.5)
    pace.spend(1.0, 100.0)
    assert pace.wait(100.0) == 0.5
    pace.spend(1.0, 1000.0)
    assert pace.wait(1000.0) == 0.5
