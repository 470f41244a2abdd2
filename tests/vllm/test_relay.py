"""A replica that is loading serves the next one. When it stops or dies, the next one continues at the seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from netloader import sync
from netloader.core.protocol import State
from netloader.transports import registry
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport, Side
from tests.models import ModelStore
from tests.vllm import harness
from tests.vllm.pulls import LogLines, Seed, Seeds, pull

pytestmark = pytest.mark.usefixtures("needs_vllm")

KIND = "llama-bf16"
WAIT = 300.0


def wait_for(condition: Callable[[], object], child: subprocess.Popen[str] | None = None) -> None:
    """Wait until `condition` holds, or fail when `child` ended meanwhile."""
    deadline = time.monotonic() + WAIT
    while not condition():
        if child is not None and child.poll() is not None:
            raise AssertionError(f"the replica ended with status {child.returncode}")
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def held_seed(seed: Seed) -> Iterator[tuple[sync.SyncServer, Faults]]:
    """Serve the seed over TCP. Each pull stops after its first block until the fault is released."""
    faults = Faults([Fault(FaultKind.HOLD, 0, side=Side.SEND, times=None)])
    transport = FaultyTransport(registry.load("tcp"), faults)
    with sync.serve(None, host="127.0.0.1", transport=transport) as server:
        server._portal.call(server._server.add, seed.holding)
        try:
            yield server, faults
        finally:
            faults.release()


@contextmanager
def replica(folder: Path, model: Path, source: str) -> Iterator[subprocess.Popen[str]]:
    """A replica in a process of its own, which loads `model` from `source`."""
    folder.mkdir()
    task = {
        "target": "tests.vllm.rank_tasks:replica",
        "arguments": {"model": str(model), "source": source},
        "folder": str(folder),
        "rank": 0,
        "world": 1,
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
    }
    with (folder / "log").open("w", encoding="utf-8") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.vllm.rank_main", json.dumps(task)],
            cwd=harness.REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("dies", [False, True], ids=["lives", "dies"])
def test_a_replica_that_is_loading_serves_the_next_one(
    dies: bool, seeds: Seeds, models: ModelStore, tmp_path: Path, log_lines: LogLines
) -> None:
    seed = seeds.get(KIND)
    log_lines.lines.clear()
    with held_seed(seed) as (server, faults), replica(tmp_path / "a", models.bare(KIND), server.address) as child:

        def transfers() -> list[Any]:
            return [session for session in server._server.sessions if session.state is State.TRANSFER]

        wait_for(transfers, child)
        assert len(transfers()) == 1
        loaded: list[harness.Loaded] = []
        # The log shows when this process, which the seed has redirected, pulls from the replica.
        watcher = threading.Thread(target=_then, args=(log_lines, child, faults, dies), name="watcher", daemon=True)
        watcher.start()
        loaded.append(pull(models.bare(KIND), server.address, TRANSPORT="tcp"))
        watcher.join(WAIT)
        assert not watcher.is_alive()
        assert loaded[0].raw == seed.disk
        assert not log_lines.with_part("default loader")
        assert log_lines.with_part("others pass it on")
        if dies:
            assert child.poll() == -9
            return
        child.wait(WAIT)
        output = (tmp_path / "a" / "log").read_text(encoding="utf-8")
        (line,) = [line for line in output.splitlines() if line.startswith("RESULT ")]
        said = json.loads(line.removeprefix("RESULT "))
        assert said["raw"] == seed.disk
        assert said["fallback"] == []
        assert said["serves"], "it serves the model again after post-processing"


def _then(log: LogLines, child: subprocess.Popen[str], faults: Faults, dies: bool) -> None:
    """When the second replica pulls from the first one: release the seed; kill the first one before if `dies`."""
    wait_for(lambda: log.with_part("transport tcp"))
    if dies:
        child.kill()
        child.wait()
    faults.release()
