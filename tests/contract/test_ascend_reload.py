"""vllm-ascend's worker cannot reload, so how its layers reload was never compared with a first load.

`netloader/vllm/model/unquantised.py` counts its layers as not compared, and a reload is refused. A release whose worker
can reload fails here: compare then what its layers hold after a reload with a first load, on the simulator
(`make ascend-sim`), before `reloads_exactly` knows them.
"""

from __future__ import annotations

import ast

from tests.contract.names import OLDEST
from tests.contract.sources import Sources
from tests.contract.test_ascend_settings import sources as of_ascend
from tests.wheels import sources_of

RELOAD = "reload_weights"


def test_the_worker_of_vllm_ascend_has_no_reload() -> None:
    worker = of_ascend().find("vllm_ascend.worker.worker", "NPUWorker")
    assert worker is not None
    assert isinstance(worker[1], ast.ClassDef)
    assert [ast.unparse(base) for base in worker[1].bases] == ["WorkerBase"]
    assert of_ascend().find("vllm_ascend.worker.worker", f"NPUWorker.{RELOAD}") is None
    engine = Sources(sources_of("vllm", OLDEST))
    assert engine.find("vllm.v1.worker.worker_base", "WorkerBase") is not None
    assert engine.find("vllm.v1.worker.worker_base", f"WorkerBase.{RELOAD}") is None
    assert engine.find("vllm.v1.worker.gpu_worker", f"Worker.{RELOAD}") is not None, "it would be found"


def test_its_layers_post_process_in_their_own_way() -> None:
    """Why `reloads_exactly` does not take them for vLLM's own."""
    owner = "AscendUnquantizedLinearMethod"
    assert of_ascend().find("vllm_ascend.ops.linear", f"{owner}.process_weights_after_loading") is not None
