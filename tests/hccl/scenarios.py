"""What has to hold between processes, for the simulated ``npu`` and for the real torch_npu.

Each takes the environment of the processes, which selects one of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from tests.hccl.processes import PATIENCE, Child, receiver, seed

Environment = Mapping[str, str]
COMMUNICATOR = 2 * 20 << 20


def all_right(said: Mapping[str, Any]) -> None:
    """Check that every byte arrived, and that no tensor has other memory."""
    assert said.get("wrong") == [], said
    assert said["moved"] == []


def at_rest(child: Child, used: int | None = None) -> dict[str, Any]:
    """Wait until the seed holds no group, no thread and no turn; return its state."""
    until = time.monotonic() + PATIENCE
    while True:
        said = child.ask("status")
        if said["communicators"] == 0 and said["threads"] == [] and said["sessions"] == 0:
            assert said["environment"] is None  # the blocking wait variable is restored
            assert used is None or said["used"] <= used + (64 << 20)
            return said
        assert time.monotonic() < until, (said, child.text())


def a_pull_is_right(environment: Environment) -> tuple[Child, Child]:
    """One pull: all dtypes, bytes and addresses; the seed and the receiver, both ended."""
    with seed(environment, mib=24) as (source, port):
        used = at_rest(source)["used"]
        with receiver(environment, port, mib=24) as one:
            all_right(one.heard())
            assert one.ended() == 0
        at_rest(source, used)
        assert source.ended() == 0
    return source, one


def receivers_that_die_cost_the_seed_nothing(environment: Environment) -> None:
    """Three receivers at once: one is killed, one stops reading, one completes; so does another one afterwards."""
    with seed(environment, stall=3, mib=24) as (source, port):
        used = at_rest(source)["used"]
        with (
            receiver(environment, port, "npu:0", then="die", stall=20, mib=24) as dying,
            receiver(environment, port, "npu:1", then="stop", after=0.2, stall=20, mib=24) as stopping,
            receiver(environment, port, "npu:3", stall=20, mib=24) as good,
        ):
            assert stopping.heard() == {"stopped": True}
            all_right(good.heard())
            assert good.ended() == 0
            assert dying.ended() == -9
            at_rest(source, used)  # while the one that stopped is still connected and silent
            assert stopping.process.poll() is None
        with receiver(environment, port, "npu:0", mib=24) as late:
            all_right(late.heard())
            assert late.ended() == 0
        at_rest(source, used)
        assert source.ended() == 0


def a_lost_seed_is_an_error(environment: Environment) -> None:
    """The receiver gets an error soon, and its process goes on."""
    # More than one request window, so that requests remain when the seed is gone.
    with seed(environment, mib=48) as (source, port):
        with receiver(environment, port, then="tell", after=0.1, mib=48, stall=30) as one:
            assert one.heard()["verified"] > 0
            source.kill()
            said = one.ask("go on")
            assert said["kind"] == "NoSourceLeft", said
            assert one.ended() == 0
        assert source.ended() == -9


def nothing_is_opened_while_memory_is_measured(environment: Environment) -> None:
    """A client is refused with a retry time, and is served afterwards."""
    with seed(environment, mib=8) as (source, port):
        assert source.ask("still") == {"still": True}
        with receiver(environment, port, mib=8) as early:
            said = early.heard()
            assert "memory is being measured" in said["error"], said
            early.ended()
        with receiver(environment, port, mib=8, wait=60) as patient:
            assert source.ask("move") == {"still": False}
            all_right(patient.heard())
            assert patient.ended() == 0
        at_rest(source)
        assert source.ended() == 0
