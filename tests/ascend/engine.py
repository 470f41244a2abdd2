"""One engine's rank in a process of its own: the real NPUWorker of vllm-ascend on one simulated card.

Requests are lines of JSON on the standard input, answers lines of JSON on the standard output; it ends when the input
does. The card is named by ASCEND_RT_VISIBLE_DEVICES and is ``npu:0`` here.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch_npu

from netloader.vllm.model.processed import FACTS, survey
from tests.ascend import (
    preload,  # noqa: F401 - first of all
    sleeping,
)
from tests.vllm import harness

BeforeProcessing = Callable[[torch.nn.Module], None]


@contextmanager
def before_processing(call: BeforeProcessing) -> Iterator[None]:
    """Call with each model between `load_weights` and post-processing."""
    from vllm.model_executor.model_loader import base_loader

    original = base_loader.process_weights_after_loading

    def observe(model: torch.nn.Module, *arguments: Any) -> None:
        call(model)
        original(model, *arguments)

    base_loader.process_weights_after_loading = observe
    try:
        yield
    finally:
        base_loader.process_weights_after_loading = original


def start_worker(task: dict[str, Any]) -> Any:
    """A worker that is about to load its model: vllm-ascend has patched vLLM.

    Args:
        task: `model`, a folder; `load_format`; `extra`, the loader's settings; `arguments` of the engine; `rank`, and
            `store`, the file in which the ranks of the engine meet.
    """
    from vllm.config import set_current_vllm_config
    from vllm.utils.import_utils import resolve_obj_by_qualname

    config = harness.engine_config(
        task["model"], load_format=task["load_format"], extra=task["extra"], **task["arguments"]
    )
    if config.model_config.enable_sleep_mode:
        sleeping.give_allocator()
    worker_class = resolve_obj_by_qualname(config.parallel_config.worker_cls)
    with set_current_vllm_config(config):
        worker = worker_class(
            vllm_config=config,
            local_rank=0,
            rank=task["rank"],
            distributed_init_method=f"file://{task['store']}",
            is_driver_worker=task["rank"] == 0,
        )
        worker.init_device()
    return worker


def models_of(worker: Any) -> dict[str, torch.nn.Module]:
    """The models of a worker, by their role."""
    found = {"target": worker.model_runner.model}
    drafter = getattr(worker.model_runner, "drafter", None)
    if drafter is not None:
        found["draft"] = drafter.model
    return found


def everything(model: torch.nn.Module) -> dict[str, str]:
    """Digests of all tensors that a post-processed model holds, whatever object holds them, with maps of experts."""
    found = survey(model, {})
    maps = {name: text for name, text in found.facts.items() if text.startswith("map ")}
    return maps | {name: harness.tensor_digest(t) for name, t in found.tensors.items() if name != FACTS}


def say(answer: dict[str, Any]) -> None:
    """Write a line of JSON for the test, in one piece: several threads may."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _name(x: object) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"


class Engine:
    """What the requests of one process act on."""

    def __init__(self) -> None:
        self.worker: Any = None

    def prepare(self, task: dict[str, Any]) -> dict[str, Any]:
        """Change how this process serves or pulls from now on; see `tests.ascend.halves`."""
        from tests.ascend import halves

        if "blocks" in task:
            halves.cut_into(task["blocks"])
        if not task.get("computed", True):
            halves.compute_nothing()
        if "hold" in task:
            halves.hold_after(task["hold"])
        if not task.get("fingerprint", True):
            halves.know_no_fingerprint()
        if "tell" in task:
            halves.tell_at(task["tell"], say)
        return {}

    def load(self, task: dict[str, Any]) -> dict[str, Any]:
        """Start a worker; digests of its models' raw and final tensors, by role.

        With `held`, the load goes on before post-processing when another line is on the standard input.
        """
        raw: list[dict[str, str]] = []

        def observe(model: torch.nn.Module) -> None:
            raw.append(harness.raw_digests(model))
            if task.get("held"):
                sys.stdin.readline()

        self.worker = start_worker(task)
        with before_processing(observe):
            self.worker.load_model()
        models = models_of(self.worker)
        return {
            "raw": dict(zip(models, raw, strict=True)),
            "final": {role: everything(model) for role, model in models.items()},
        }

    def survey(self, task: dict[str, Any]) -> dict[str, Any]:
        """Start a worker; what became of its models' raw tensors."""
        from tests.ascend import outcomes

        seen: list[outcomes.Before] = []
        self.worker = start_worker(task)
        with before_processing(lambda model: seen.append(outcomes.Before(model))):
            self.worker.load_model()
        models = models_of(self.worker)
        rows = [row for before, model in zip(seen, models.values(), strict=True) for row in before.compare(model)]
        return {
            "worker": _name(self.worker),
            "runner": _name(self.worker.model_runner),
            "quantization": self.worker.vllm_config.model_config.quantization,
            "roles": list(models),
            "rows": rows,
        }

    def profile(self, task: dict[str, Any]) -> dict[str, Any]:
        """Measure the memory, as the engine's next step, without the forward pass: nothing computes here.

        Returns:
            `bytes` for the KV cache, and those of the whole `card`.
        """
        self.worker.model_runner.profile_run = lambda *args, **kwargs: None
        return {"bytes": self.worker.determine_available_memory(), "card": torch_npu.npu.mem_get_info()[1]}

    def sleep(self, task: dict[str, Any]) -> dict[str, Any]:
        """Let the worker sleep at `level`; the bytes that this freed on its card."""
        before, _ = torch_npu.npu.mem_get_info()
        self.worker.sleep(task["level"])
        return {"freed": torch_npu.npu.mem_get_info()[0] - before}

    def wake_up(self, task: dict[str, Any]) -> dict[str, Any]:
        """Wake what has one of `tags`, or everything if that is None."""
        self.worker.wake_up(task["tags"])
        return {}

    def update(self, task: dict[str, Any]) -> dict[str, Any]:
        """Let a trainer, which the test stands for, write zeros into the tensor `name`, in place."""
        self.worker.weight_transfer_engine = sleeping.Trainer(task["name"])
        self.worker.start_weight_update(is_checkpoint_format=False)
        self.worker.update_weights({})
        self.worker.finish_weight_update()
        return {}

    def final(self, task: dict[str, Any]) -> dict[str, Any]:
        """Digests of what its models hold now, by role."""
        return {role: everything(model) for role, model in models_of(self.worker).items()}

    def change(self, task: dict[str, Any]) -> dict[str, Any]:
        """Change this process before it loads: a name in `tests.ascend.changes`."""
        from tests.ascend import changes

        changes.CHANGES[task["change"]]()
        return {}

    def values(self, task: dict[str, Any]) -> dict[str, Any]:
        """The plain values of each model, by role, by the path to them."""
        return {role: survey(model, {}).facts for role, model in models_of(self.worker).items()}

    def spoil(self, task: dict[str, Any]) -> dict[str, Any]:
        """Change the first value of a tensor that is served."""
        tensor = survey(self.worker.model_runner.model, {}).tensors[task["tensor"]]
        tensor.flatten()[0:1].add_(1)
        return {}

    def built(self, task: dict[str, Any]) -> dict[str, Any]:
        """How many layers with experts are alive, how many vllm-ascend has noted, and the numbers that they have."""
        import gc

        from vllm_ascend.eplb.adaptor.vllm_adaptor import VllmEplbAdaptor
        from vllm_ascend.ops.fused_moe.fused_moe import AscendFusedMoE

        gc.collect()
        layers = [each for each in gc.get_objects() if isinstance(each, AscendFusedMoE)]
        numbers = sorted(layer.moe_instance_id for layer in layers)
        return {"numbers": numbers, "noted": len(VllmEplbAdaptor._registered_moe_layers)}

    def serving(self, task: dict[str, Any]) -> dict[str, Any]:
        """The address of this process's server, if it has one."""
        from netloader.vllm.serve.serving import running_server

        server = running_server()
        return {"address": None if server is None else server.address}

    def close(self) -> None:
        """End the server, as the end of an engine does."""
        from netloader.vllm.serve import serving

        serving.stop_server()


def serve_requests(engine: Any) -> None:
    """Answer requests by the methods of `engine` until there are no more, then close it."""
    for line in sys.stdin:
        task = json.loads(line)
        try:
            answer = getattr(engine, task["do"])(task)
        except Exception as error:  # noqa: BLE001 - the test that asked reports it
            traceback.print_exc()
            # With dynamic EPLB, a worker has processes that plan where experts move. They would outlive this one.
            for child in multiprocessing.active_children():
                child.terminate()
            answer = {"error": f"{type(error).__name__}: {error}"}
        say(answer)
    engine.close()


if __name__ == "__main__":
    serve_requests(Engine())
