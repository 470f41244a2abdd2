"""vLLM's own loading path in this process, without an engine.

Importing vLLM takes about half a minute, once per process. After that, a tiny model loads in one or two seconds. Each
load gets a configuration of its own, because layers register their names in it. The distributed state is set up once.
Digests are computed with hashlib over the plain bytes, so that they share no code with the code under test.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

REPOSITORY = Path(__file__).resolve().parents[2]
RANK_TIMEOUT = 600.0
_RESULT = "RESULT "


@dataclass
class Loaded:
    """The result of a load: the model, and the digest of every raw tensor after `load_weights`."""

    model: torch.nn.Module
    raw: dict[str, str] = field(default_factory=dict)


@contextmanager
def distributed(
    folder: Path, *, rank: int = 0, world: int = 1, tensor_parallel: int = 1, pipeline_parallel: int = 1
) -> Iterator[None]:
    """vLLM's distributed state over gloo and a file store in `folder`; torn down on leaving."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    original = torch.accelerator.empty_cache
    # vLLM's CPU worker does the same: without an accelerator the call raises.
    torch.accelerator.empty_cache = lambda: None
    store = folder / "store"
    try:
        with set_current_vllm_config(VllmConfig()):
            parallel_state.init_distributed_environment(world, rank, f"file://{store}", rank, backend="gloo")
            parallel_state.ensure_model_parallel_initialized(tensor_parallel, pipeline_parallel)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
        torch.accelerator.empty_cache = original


def engine_config(
    model: Path, *, load_format: str = "auto", extra: Mapping[str, Any] | None = None, **arguments: Any
) -> VllmConfig:
    """The configuration that `vllm serve` would build for `model` with these engine arguments."""
    from vllm import EngineArgs

    settings: dict[str, Any] = {
        "model": str(model),
        "load_format": load_format,
        "model_loader_extra_config": dict(extra or {}),
        "enforce_eager": True,
        "max_model_len": 512,
        "kv_cache_memory_bytes": 1 << 26,
        **arguments,
    }
    return EngineArgs(**settings).create_engine_config()


def load(config: VllmConfig, *, role: str = "target") -> Loaded:
    """Load the target (or the draft) model of `config` with the loader that its load format names."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    arguments: dict[str, Any] = {}
    if role == "draft":
        speculative = config.speculative_config
        if speculative is not None and speculative.use_eagle():
            # Such a proposer passes the engine's own configuration to the loader.
            arguments = {"model_config": speculative.draft_model_config}
        else:
            config = draft_config(config)
            arguments = {"prefix": "draft_model"}
    loaded: dict[str, str] = {}
    with set_current_vllm_config(config), _digests_after_load_weights(loaded):
        model = get_model(vllm_config=config, **arguments)
    return Loaded(model, loaded)


def share_with_target(config: VllmConfig, draft: torch.nn.Module, target: torch.nn.Module) -> None:
    """What vLLM's proposer does with a draft model and its target once both are loaded."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    # The methods are called on an object with the attributes that they read. A real proposer needs a model runner.
    proposer: Any = SimpleNamespace(model=draft, vllm_config=config, use_local_argmax_reduction=False)
    SpecDecodeBaseProposer._maybe_share_embeddings(proposer, target)
    SpecDecodeBaseProposer._maybe_share_lm_head(proposer, target)


def draft_config(config: VllmConfig) -> VllmConfig:
    """The configuration that vLLM passes to the loader of a draft model (speculative method `draft_model`)."""
    from vllm.config.utils import replace

    speculative = config.speculative_config
    if speculative is None:
        raise ValueError("the configuration names no speculative model")
    return replace(
        config,
        quant_config=None,
        parallel_config=replace(speculative.draft_parallel_config, rank=config.parallel_config.rank),
        model_config=speculative.draft_model_config,
    )


def raw_digests(model: torch.nn.Module) -> dict[str, str]:
    """SHA-256 of dtype, shape and bytes of every parameter and persistent buffer, under every name."""
    return {name: tensor_digest(tensor) for name, tensor in named_tensors(model)}


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of one tensor's dtype, shape and bytes in C order."""
    import torch

    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)} ".encode())
    if plain.numel():
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and persistent buffer, under every name."""
    seen: set[str] = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        buffers = ((n, t) for n, t in module._buffers.items() if n not in module._non_persistent_buffers_set)
        for name, tensor in [*module._parameters.items(), *buffers]:
            full = f"{prefix}.{name}" if prefix else name
            if tensor is not None and full not in seen:
                seen.add(full)
                yield full, tensor


@contextmanager
def _digests_after_load_weights(into: dict[str, str]) -> Iterator[None]:
    # With every loader, this is the first call that vLLM makes for a model after load_weights.
    from vllm.model_executor.model_loader import base_loader

    original = base_loader.process_weights_after_loading

    def observe(model: torch.nn.Module, *arguments: Any) -> None:
        into.update(raw_digests(model))
        original(model, *arguments)

    base_loader.process_weights_after_loading = observe
    try:
        yield
    finally:
        base_loader.process_weights_after_loading = original


@dataclass(frozen=True)
class RankResult:
    """How one rank's process ended: what its function returned, its exit status, and everything it wrote."""

    value: Any
    returncode: int
    output: str


def run_ranks(
    target: str,
    arguments: Sequence[Mapping[str, Any]],
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    timeout: float = RANK_TIMEOUT,
) -> list[RankResult]:
    """Run the function `target` ("package.module:name") once per rank, each in a process of its own.

    Each process sets up the distributed state for its rank and calls the function with its own keyword arguments; the
    return value must be JSON. Every process has ended when this returns, also on a timeout.
    """
    with tempfile.TemporaryDirectory(prefix="netloader-ranks-") as folder:
        children = [
            _start_rank(target, kwargs, Path(folder), rank, len(arguments), tensor_parallel, pipeline_parallel)
            for rank, kwargs in enumerate(arguments)
        ]
        try:
            outputs = [child.communicate(timeout=timeout)[0] for child in children]
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                    child.wait()
    return [_rank_result(child.returncode, output) for child, output in zip(children, outputs, strict=True)]


def _start_rank(
    target: str, kwargs: Mapping[str, Any], folder: Path, rank: int, world: int, tensor: int, pipeline: int
) -> subprocess.Popen[str]:
    task = {
        "target": target,
        "arguments": dict(kwargs),
        "folder": str(folder),
        "rank": rank,
        "world": world,
        "tensor_parallel": tensor,
        "pipeline_parallel": pipeline,
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.vllm.rank_main", json.dumps(task)],
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _rank_result(returncode: int, output: str) -> RankResult:
    lines = [line for line in output.splitlines() if line.startswith(_RESULT)]
    value = json.loads(lines[-1].removeprefix(_RESULT)) if lines else None
    return RankResult(value, returncode, output)


def run_rank_task(task: Mapping[str, Any], resolve: Callable[[str], Callable[..., Any]]) -> str:
    """Run the function of one rank for `run_ranks`. The returned line has the result, for the parent process."""
    with distributed(
        Path(task["folder"]),
        rank=task["rank"],
        world=task["world"],
        tensor_parallel=task["tensor_parallel"],
        pipeline_parallel=task["pipeline_parallel"],
    ):
        value = resolve(task["target"])(**task["arguments"])
    return _RESULT + json.dumps(value)
