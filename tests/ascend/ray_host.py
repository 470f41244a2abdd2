"""An engine whose ranks Ray starts on two nodes of this host, with a simulated card each.

Requests and answers are those of `tests.ascend.host`. The first node is the one of this process.
"""

from __future__ import annotations

from typing import Any

import ray  # type: ignore[import-not-found]
from ray.cluster_utils import Cluster  # type: ignore[import-not-found]

from tests.ascend import preload  # noqa: F401 - before anything of vLLM

# isort: split
from vllm.utils.network_utils import get_ip

from tests.ascend.engine import serve_requests
from tests.ascend.host import Host

SECOND = "127.0.0.2"
"""The address of the second node: vLLM wants another one for each."""


def prepare_worker() -> None:
    """In each process that Ray starts."""
    import tests.ascend.preload  # noqa: F401 - first of all

    # isort: split
    import vllm_ascend.worker.worker  # noqa: F401 - its modules import each other: this one goes before the others

    from tests.ascend import workers

    workers.record_raw_digests()
    workers.compute_nothing()


class RayHost(Host):
    """What the requests of this process act on."""

    def __init__(self) -> None:
        super().__init__()
        self._cluster = Cluster()
        node: dict[str, Any] = {"num_cpus": 2, "resources": {"NPU": 1}}
        self._cluster.add_node(**node, include_dashboard=False, env_vars={"VLLM_HOST_IP": get_ip()})
        self._cluster.add_node(**node, node_ip_address=SECOND, env_vars={"VLLM_HOST_IP": SECOND})
        ray.init(address=self._cluster.address, runtime_env={"worker_process_setup_hook": prepare_worker})

    def end(self, task: dict[str, Any]) -> dict[str, Any]:
        """End the workers and the cluster."""
        if self.executor is not None:
            self.executor.shutdown()
        ray.shutdown()
        self._cluster.shutdown()
        return {}


if __name__ == "__main__":
    serve_requests(RayHost())
