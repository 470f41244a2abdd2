"""What one `vllm serve` command runs on its host: vllm-ascend's own executor, which starts the workers of that host.

Requests and answers are those of `tests.ascend.engine`. Each host has one simulated card. The workers are forked: they
have what is imported and replaced here.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from tests.ascend import preload  # noqa: F401 - first of all

# isort: split
from tests.ascend import workers
from tests.ascend.engine import serve_requests
from tests.vllm import harness


def pass_engine_core(config: Any, dp_rank: int, local_dp_rank: int) -> None:
    """Change `config` as vLLM's engine core does before it makes its executor. No engine core is made."""
    from vllm.v1.engine import core

    run = core.EngineCoreProc.run_engine_core
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    names = ("EngineCoreProc", "DPEngineCoreProc", "decorate_logs")
    with mock.patch.multiple(core, **dict.fromkeys(names, mock.DEFAULT)):
        run(vllm_config=config, dp_rank=dp_rank, local_dp_rank=local_dp_rank)
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Host:
    """What the requests of one process act on."""

    def __init__(self) -> None:
        self.executor: Any = None
        self._leads = False

    def load(self, task: dict[str, Any]) -> dict[str, Any]:
        """Start the executor, whose workers load the model.

        Args:
            task: `model`, `load_format`, `extra` and `arguments` as for `tests.ascend.engine`; `core`, the number of
                the engine core among those of the command; `ports`, what the front ends of data-parallel engines tell
                each other.

        Returns:
            `ranks`: what `workers.describe` says of each rank of the executor, if this host leads it.
        """
        from vllm.v1.executor import Executor

        config = harness.engine_config(
            Path(task["model"]), load_format=task["load_format"], extra=task["extra"], **task["arguments"]
        )
        parallel = config.parallel_config
        parallel._data_parallel_master_port_list = list(task["ports"])
        self._leads = parallel.node_rank_within_dp == 0
        if self._leads:  # the other hosts of an engine have an executor only
            pass_engine_core(config, parallel.data_parallel_rank + task["core"], task["core"])
        workers.record_raw_digests()
        workers.compute_nothing()
        self.executor = Executor.get_class(config)(config)
        return {"ranks": self._call(workers.describe)}

    def _call(self, what: str | Callable[[Any], Any]) -> Any:
        return self.executor.collective_rpc(what) if self._leads else []

    def profile(self, task: dict[str, Any]) -> dict[str, Any]:
        """Measure the memory of all ranks of the executor, if this host leads it."""
        return {"bytes": self._call("determine_available_memory")}

    def end(self, task: dict[str, Any]) -> dict[str, Any]:
        """End the workers, as vLLM ends them when they do not end by themselves."""
        if self.executor is not None:
            for worker in self.executor.workers:
                worker.proc.terminate()
            self.executor.shutdown()
        return {}

    def close(self) -> None:
        """Nothing: a test that failed leaves the workers without their parent, and then they end."""


if __name__ == "__main__":
    serve_requests(Host())
