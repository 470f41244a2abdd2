# ruff: noqa: INP001 - on PYTHONPATH by itself, as an installed module would be
"""Makes `vllm serve` run on the simulated NPU, which computes nothing: answers are made from the weights instead.

On PYTHONPATH, it is loaded into every process of vLLM as a general plugin. An engine loads, measures its memory, makes
its KV cache and schedules requests as always. In the place of the forward pass, each token is a digest of all weights
that the model has at that moment, of the prompt, and of the token's place. So engines answer equally if, and only if,
their weights are equal.
"""

from __future__ import annotations

import hashlib
from collections import deque
from typing import Any

_TOP = 5


class _Answers:
    """The next token of each request.

    Attributes:
        asked: By the id of a request, its prompt and how many tokens it has.
        made: Outputs of steps whose tokens nobody has sampled yet.
    """

    def __init__(self) -> None:
        self.asked: dict[str, tuple[bytes, int]] = {}
        self.made: deque[Any] = deque()

    def step(self, model: Any, vocabulary: int, scheduled: Any) -> Any:
        """One token for each scheduled request, which has its whole prompt in its first step."""
        import numpy as np
        from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, LogprobsLists, ModelRunnerOutput

        for request in scheduled.finished_req_ids:
            self.asked.pop(request, None)
        for new in scheduled.scheduled_new_reqs:
            self.asked[new.req_id] = (repr(new.prompt_token_ids).encode(), 0)
        if not scheduled.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        weights = _digest(model)
        requests = list(scheduled.num_scheduled_tokens)
        tokens, scores = [], []
        for request in requests:
            prompt, place = self.asked[request]
            self.asked[request] = (prompt, place + 1)
            found = hashlib.blake2b(weights + prompt + b"%d" % place).digest()
            tokens.append(int.from_bytes(found[:8], "big") % vocabulary)
            scores.append([-byte / 256 for byte in sorted(found[8 : 9 + _TOP])])
        ids = np.array([[(token + more) % vocabulary for more in range(_TOP + 1)] for token in tokens], dtype=np.int32)
        return ModelRunnerOutput(
            req_ids=requests,
            req_id_to_index={request: place for place, request in enumerate(requests)},
            sampled_token_ids=[[token] for token in tokens],
            logprobs=LogprobsLists(ids, np.array(scores, dtype=np.float32), np.zeros(len(tokens), dtype=np.int32)),
            pooler_output=[],
        )


def _digest(model: Any) -> bytes:
    import torch

    found = hashlib.blake2b()
    for name, tensor in model.named_parameters():
        found.update(name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.digest()


def register() -> None:
    """Replace what computes: called by vLLM in each of its processes."""
    import torch_npu

    if torch_npu.__version__ != "0.0.sim":
        raise RuntimeError(f"this plugin needs the simulated torch_npu, found {torch_npu.__version__}")
    from vllm.v1.worker.worker_base import CompilationTimes
    from vllm_ascend.platform import NPUPlatform

    # torch has no pinned memory for a device that is implemented in Python. Modules ask while they are imported.
    NPUPlatform.is_pin_memory_available = classmethod(lambda cls: False)
    from vllm_ascend.worker import worker  # before the module of the runner, which it imports

    answers = _Answers()

    def execute_model(self: Any, scheduler_output: Any) -> Any:
        vocabulary = self.model_config.get_vocab_size()
        output = answers.step(self.model_runner.get_model(), vocabulary, scheduler_output)
        if not output.req_ids:
            return output
        answers.made.append(output)
        return None

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        del self, grammar_output
        return answers.made.popleft()

    worker.NPUModelRunner.profile_run = lambda self, *args, **more: None
    worker.NPUWorker.compile_or_warm_up_model = lambda self: CompilationTimes(0.0, 0.0)
    worker.NPUWorker.execute_model = execute_model
    worker.NPUWorker.sample_tokens = sample_tokens
