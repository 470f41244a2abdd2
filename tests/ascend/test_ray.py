"""Which `device_id` is which rank if Ray starts the ranks. `make ascend-sim` installs no Ray: without it nothing runs.

Ray has two nodes on this host, and gives each worker the first card of its node. So seed and client would meet on one
card, and the weights go over tcp.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from tests.ascend.deployments import Deployment, Running, free_ports, over_hosts
from tests.ascend.kinds import KINDS, Store
from tests.ascend.pulls import differences, settings

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

BY_RAY = Deployment(
    "w8a8",
    lambda ports: [{"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}],
    1,
    [{"tp_size": 2, "tp_rank": rank} for rank in (0, 1)],
    module="tests.ascend.ray_host",
    python=sys.executable,
)
BY_COMMANDS = Deployment("w8a8", over_hosts(2, tensor_parallel_size=2), 2, BY_RAY.places)
KEPT: Mapping[str, Any] = {"INT8_CACHE": "no", "KEEP_RAW": False, "TRANSPORT": "tcp"}


def test_ranks_that_ray_starts_are_those_that_commands_start(store: Store) -> None:
    """Rank 0 is on the node that starts the engine. One engine pulls from the other."""
    model = KINDS[BY_RAY.kind].model
    base = free_ports(2, in_a_row=True)[0]
    with Running.on([0], BY_RAY) as seed, Running.on([2, 3], BY_COMMANDS) as client:
        theirs = seed.load(store.get(model), settings((), LISTEN_PORT=base, **KEPT))
        assert [(rank.number, rank.topology["tp_rank"], rank.port - base) for rank in theirs] == [(0, 0, 0), (1, 1, 1)]
        assert [rank.address.startswith("127.0.0.2:") for rank in theirs] == [False, True]
        seed.profiled()
        addresses = [rank.address for rank in theirs]
        ours = client.load(store.bare(model), settings(addresses, SERVE=False, FALLBACK=False, **KEPT))
        for rank in theirs:
            assert client.count(f"rank {rank.number}: target: pulled", f" from {rank.address} over tcp") == 1
    assert not differences([rank.digests for rank in ours], [rank.digests for rank in theirs])
