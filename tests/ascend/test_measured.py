"""A client of a seed that is still loading, then measures its memory, and then serves: it waits, and pulls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.ascend.deployments import LOOPBACK, free_ports
from tests.ascend.kinds import Store
from tests.ascend.processes import PATIENCE
from tests.ascend.pulls import Instance, differences, settings

MEASURE = {"kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.5}
"""With a given size of the KV cache, the worker would measure nothing."""

KEPT: Mapping[str, Any] = {"TRANSPORT": "hccl", "INT8_CACHE": "no", "KEEP_RAW": False}


def test_a_client_waits_until_the_worker_has_loaded_and_measured(store: Store, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    source = f"{LOOPBACK}:{port}"
    with Instance.on([0], tmp_path / "seed") as seed, Instance.on([1], tmp_path / "client") as client:
        ((serving,), (pulling,)) = seed.engines, client.engines
        own = settings(LISTEN_HOST=LOOPBACK, LISTEN_PORT=port, **KEPT)
        serving.begin_load(store.get("w8a8"), MEASURE, own, held=True)
        serving.logs("the default loader (auto) loads the target", patience=PATIENCE)

        theirs = settings([source], SERVE=False, FALLBACK=False, WAIT=600, **KEPT)
        pulling.begin_load(store.bare("w8a8"), MEASURE, theirs)
        pulling.logs(f"waiting for {source}: the model is still being loaded", patience=PATIENCE)

        serving.tell("")  # and the load goes on
        loaded = serving.answer()
        assert len(seed.lines(f"serves target at {source} ")[0]) == 1, serving.text()
        busy = (f"source {source}: no HCCL group can be made", "the engine is measuring its memory")
        pulling.logs(*busy, patience=PATIENCE)
        assert client.lines("target: pulled") == [[]]

        (measured,) = seed.all("profile")
        assert 0 < measured["bytes"] < measured["card"] / 2
        pulled = pulling.answer()
        assert len(client.lines("target: pulled 3.80 MB of tiny", f"from {source} over hccl")[0]) == 1, pulling.text()
    assert not differences([pulled], [loaded])
