"""The functions that `harness.run_ranks` runs. Each runs in every rank and returns JSON."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
import unittest.mock
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from netloader.session.holding import Holding
from netloader.tensors import hold
from netloader.vllm.load import inspect_engine, pull_weights
from netloader.vllm.load.inspect_engine import NothingPulled
from netloader.vllm.model.agreement import AgreementError
from netloader.vllm.serve import serving
from tests.vllm import harness
from tests.vllm.drafts import KINDS, Pair, load_pair
from tests.vllm.pulls import DRAFT, LogLines, extra, offered, source_of


def load_from_disk(model: str, arguments: dict[str, Any]) -> dict[str, str]:
    """Load with vLLM's default loader; the raw digests of this rank's shard."""
    return harness.load(harness.engine_config(Path(model), **arguments)).raw


def register_test_method() -> None:
    """Register the quantisation method of the tests, if this vLLM supports processed weights."""
    from tests.vllm.releases import KNOWS_PROCESSED

    if KNOWS_PROCESSED:
        import tests.vllm.processed_method  # noqa: F401 - importing it is what registers it


class Rank:
    """One rank's seeds and loads."""

    def __init__(self, models: dict[str, str], arguments: dict[str, Any]) -> None:
        from netloader.vllm.plugin import register

        register()
        register_test_method()
        self.number = torch.distributed.get_rank()
        self.models = {name: Path(path) for name, path in models.items()}
        self.arguments = arguments
        self.log = LogLines()
        logging.getLogger("netloader").addHandler(self.log)
        self.alive: list[harness.Loaded] = []  # a server keeps no model alive
        self.disk = load_from_disk(models["full"], arguments)

    def seed(self, model: str) -> Holding:
        """This rank's share of a seed."""
        loaded, holding = offered(self.models[model], {}, self.arguments)
        self.alive.append(loaded)
        return holding

    def load(self, model: str, *sources: str, **settings: Any) -> dict[str, str]:
        """Load this rank's share, from sources of this rank; the log begins anew."""
        self.log.lines.clear()
        if sources:
            settings["SOURCE"] = [{"device_id": self.number, "sources": list(sources)}]
        config = harness.engine_config(
            self.models[model], load_format="netloader", extra=extra(**settings), **self.arguments
        )
        loaded = harness.load(config)
        self.alive.append(loaded)
        return loaded.raw

    def pull(self, model: str, *sources: str, **settings: Any) -> dict[str, str]:
        """`load` without serving."""
        return self.load(model, *sources, **{"SERVE": False, **settings})

    def reason(self) -> str:
        """Why the default loader ran in the last load; empty when it did not."""
        lines = self.log.with_part("the default loader")
        return lines[0] if lines else ""


def stories(models: dict[str, str], arguments: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Pulls by all ranks of an engine, in every case in which one rank differs from the other."""
    rank = Rank(models, arguments)
    other_rank = rank.number == 1
    seen: dict[str, Any] = {}
    seed, other = rank.seed("full"), rank.seed("other")
    with ExitStack() as stack:
        good = stack.enter_context(source_of(seed))
        strange = stack.enter_context(source_of(other))
        wrong = stack.enter_context(source_of(seed, names={"MODEL": "another"}))
        # Sources that announce no fingerprint, or neither fingerprint nor load.
        vague = stack.enter_context(source_of(other, fingerprint=""))
        silent = [stack.enter_context(source_of(each, fingerprint="", load="")) for each in (seed, other)]

        seen["all pull"] = rank.pull("bare", good) == rank.disk, rank.reason()
        raw = rank.pull("full", wrong if other_rank else good)
        seen["one is refused"] = raw == rank.disk, rank.reason()
        raw = rank.pull("full", *([] if other_rank else [good]))
        seen["one has no source"] = raw == rank.disk, rank.reason()
        raw = rank.pull("full", strange if other_rank else good)
        seen["other checkpoint"] = raw == rank.disk, rank.reason()
        raw = rank.pull("full", vague if other_rank else good)
        seen["other weights"] = raw == rank.disk, rank.reason()
        raw = rank.pull("full", silent[other_rank])
        seen["no proof"] = raw == rank.disk, rank.reason()
        # Rank 1 loads other weights by default than the source of rank 0 holds. That shows only after the load.
        raw = rank.pull("full", *([] if other_rank else [vague]))
        seen["a mixture"] = raw == rank.disk, rank.reason()
        # One rank fails to record its weights. It still takes part in each exchange, and serves nothing.
        with unittest.mock.patch(
            "netloader.tensors.hold", side_effect=MemoryError("none left") if other_rank else hold
        ):
            raw = rank.load("full")
        serving.stop_server()
        seen["recording fails"] = (
            raw == rank.disk,
            "".join(rank.log.with_part("does not serve its target", "recording")),
        )
        try:
            rank.pull("full", wrong if other_rank else good, FALLBACK=False)
        except NothingPulled as error:
            seen["no fallback"] = True, str(error)

        # A client serves what it pulled, under the same load digest.
        rank.load("bare", good, OUTPUT_PREFIX=prefix)
        server = serving.running_server()
        if server is None:
            raise AssertionError("no server")
        file = Path(f"{prefix}{rank.number}.txt")
        seen["address file"] = file.read_text(encoding="ascii") == server.address, server.address
        seen["next generation"] = rank.pull("bare", server.address) == rank.disk, rank.reason()
        serving.stop_server()
        seen["address file gone"] = not file.exists(), ""
    seen["load"] = True, seed.announcement.identity.load
    seen["shard"] = True, json.dumps(rank.disk)
    seen["placement"] = True, seed.announcement.identity.expert_placement
    if "pipeline_parallel_size" in arguments:
        seen["draft"] = True, _draft_of_the_last_stage(rank)
    return seen


def _draft_of_the_last_stage(rank: Rank) -> str:
    """Only the last pipeline stage loads a draft model, and it must not wait for the others."""
    if rank.number == 0:
        return ""
    speculative = {"model": str(rank.models["draft"]), **DRAFT}
    config = harness.engine_config(rank.models["full"], speculative_config=speculative)
    config.load_config.load_format = "netloader"
    config.load_config.model_loader_extra_config = extra(SERVE=False)
    rank.log.lines.clear()
    harness.load(config, role="draft")
    return rank.reason()


def drafts(models: dict[str, str], arguments: dict[str, Any]) -> dict[str, Any]:
    """Targets with drafts, pulled by all ranks: one rank's draft is refused, then one rank's target."""
    rank = Rank(models, arguments)
    kind = KINDS["EAGLE"]
    speculative = kind.speculative(lambda name: rank.models[name])

    def pair(model: str, settings: dict[str, Any], draft: dict[str, Any] | None = None) -> Pair:
        rank.log.lines.clear()
        loaded = load_pair(rank.models[model], speculative, settings, draft=draft, arguments=arguments)
        rank.alive += [loaded.target, loaded.draft]
        return loaded

    seed = pair("full", extra())
    server = serving.running_server()
    if server is None:
        raise AssertionError("no server")

    def pulling(**settings: Any) -> dict[str, Any]:
        source = [{"device_id": rank.number, "sources": [server.address]}]
        return extra(SERVE=False, SOURCE=source, **settings)

    def seen(client: Pair) -> dict[str, Any]:
        pulled = [role for role in ("target", "draft") if rank.log.with_part(f"rank {rank.number}: {role}: pulled ")]
        right = (client.target.raw, client.filled(kind)) == (rank.disk, seed.filled(kind))
        return {"right": right, "pulled": pulled, "reason": rank.reason()}

    strange = pulling(EXPECT_ROOT="ab" * 32) if rank.number == 1 else pulling()
    return {
        "both": seen(pair("bare", pulling())),
        "draft refused": seen(pair("full", pulling(), strange)),
        "target refused": seen(pair("full", strange, pulling())),
    }


def processed(models: dict[str, str], arguments: dict[str, Any]) -> dict[str, Any]:
    """Processed weights, pulled by all ranks; then the structure of one rank differs from its source."""
    from netloader.vllm.model.processed import survey
    from tests.vllm.processed_method import VARIANT

    rank = Rank(models, arguments)
    other_rank = rank.number == 1

    def made() -> tuple[dict[str, str], dict[str, str]]:
        """Digests of all that the last model holds, and which names share memory with an earlier one."""
        found = survey(rank.alive[-1].model, {}).tensors
        first: dict[int, str] = {}
        for name, tensor in found.items():
            first.setdefault(tensor.data_ptr(), name)
        shared = {name: first[tensor.data_ptr()] for name, tensor in found.items() if tensor.numel()}
        return (
            {name: harness.tensor_digest(tensor) for name, tensor in found.items()},
            {name: owner for name, owner in shared.items() if name != owner},
        )

    rank.alive.append(harness.load(harness.engine_config(rank.models["full"], **arguments)))
    disk = made()
    holding = rank.seed("full")
    seen: dict[str, Any] = {"layout": holding.announcement.identity.layout, "shared": disk[1], "digests": disk[0]}
    with source_of(holding) as source:
        rank.pull("bare", source)
        seen["all pull"] = made() == disk, rank.reason()
        for broken in ("wide", "number"):
            VARIANT.now = broken if other_rank else "good"
            raw = rank.pull("full", source)
            # At the other rank, the structure differs also after a default load.
            seen[broken] = raw == rank.disk and (other_rank or made() == disk), rank.reason()
            VARIANT.now = "good"
    return seen


def one_dies(models: dict[str, str], arguments: dict[str, Any], where: str) -> dict[str, Any]:
    """Rank 1 is killed: while it pulls, or while it loads by default what rank 0 has pulled already."""
    rank = Rank(models, arguments)

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with source_of(rank.seed("full")) as source:
        if rank.number == 1 and where == "pull":
            vars(pull_weights)["pull_raw"] = die
        elif rank.number == 1:
            vars(inspect_engine)["fallback_loader"] = lambda *_: SimpleNamespace(load_weights=die)
        began = time.monotonic()
        try:
            rank.pull("full", *([source] if where == "pull" or rank.number == 0 else []))
        except AgreementError as error:
            return {"error": str(error), "seconds": time.monotonic() - began}
    return {}


def replica(model: str, source: str) -> dict[str, Any]:
    """Load from `source` over TCP, as a server; how it went."""
    from netloader.vllm.plugin import register

    register()
    log = LogLines()
    logging.getLogger("netloader").addHandler(log)
    settings = extra([source], TRANSPORT="tcp", LISTEN_HOST="127.0.0.1")
    loaded = harness.load(harness.engine_config(Path(model), load_format="netloader", extra=settings))
    fallback = log.with_part("default loader")
    return {"raw": loaded.raw, "fallback": fallback, "serves": bool(log.with_part("serves target at"))}
