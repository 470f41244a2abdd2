"""What the ranks of a live engine do when it reloads; each function runs in every rank and returns JSON."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from netloader.transports.faults import Fault, FaultKind
from netloader.vllm.live.reloading import ReloadRefused
from netloader.vllm.serve import serving
from tests.vllm import harness
from tests.vllm.pulls import extra, source_of
from tests.vllm.rank_tasks import Rank
from tests.vllm.reloads import damage, outputs, reload, same


def reloads(models: dict[str, str], arguments: dict[str, Any]) -> dict[str, Any]:
    """Reloads of two ranks. The source of rank 1 differs from case to case."""
    rank = Rank(models, arguments)
    seed, other = rank.seed("full"), rank.seed("other")
    cut = Fault(FaultKind.CUT, 1, byte=100, times=None)  # a session that delivered blocks is retried
    with ExitStack() as stack:
        good = stack.enter_context(source_of(seed))
        broken = stack.enter_context(source_of(seed, cut))
        strange = stack.enter_context(source_of(other))
        rank.load("bare", good)
        model = rank.alive[-1].model
        server = serving.running_server()
        if server is None:
            raise AssertionError("no server")
        whole = _state(model)

        def told(source: str, **settings: Any) -> dict[str, Any]:
            """Reload from `source`: why it was refused, and whether the model is as before or as it was loaded."""
            before, reason = _state(model), ""
            sources = [{"device_id": rank.number, "sources": [source]}]
            config = harness.engine_config(
                rank.models["bare"], load_format="netloader", extra=extra(SOURCE=sources, **settings), **arguments
            )
            try:
                reload(model, config)
            except ReloadRefused as error:
                reason = str(error)
            now = _state(model)
            return {"reason": reason, "unchanged": now == before, "whole": now == whole}

        mine = rank.number == 1
        named = {"EXPECT_ROOT": other.announcement.root}
        damage(model)
        seen = {
            "one source is broken": told(broken if mine else good),
            "one source has other weights": told(strange if mine else good),
            "one rank wants other weights": told(strange if mine else good, **(named if mine else {})),
        }
        seen["both reload"] = told(good)
        seen["both serve"] = {"right": rank.pull("bare", server.address) == rank.disk, "reason": rank.reason()}
        seen["both take other weights"] = told(strange, **named)
        theirs = outputs(rank.alive[1].model)  # of the second seed
        seen["both have them"] = {"right": same(outputs(model), theirs)}
        raw = rank.pull("bare", server.address)
        seen["both serve them"] = {"right": raw == rank.alive[1].raw, "reason": rank.reason()}
    return seen


def _state(model: torch.nn.Module) -> dict[str, str]:
    """Digests of the model's tensors, and of the outputs of its layers."""
    made = {f"from {name}": harness.tensor_digest(tensor) for name, tensor in outputs(model).items()}
    return {**harness.raw_digests(model), **made}
