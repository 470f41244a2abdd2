"""How often the bytes of a model are hashed between the pull and the time when it is served."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import xxhash

from netloader import sync
from netloader.config import Config
from netloader.core.identity import ModelIdentity
from netloader.core.report import PullReport
from netloader.tensors import digests
from netloader.vllm.model.copies import Keep
from netloader.vllm.model.snapshot import RawWeights, named_raw_tensors
from netloader.vllm.serve import recording
from netloader.vllm.serve.raw_holding import RawHolding, raw_holding
from netloader.vllm.serve.recording import Before, Record, record
from netloader.vllm.serve.retention import keep_policy

ORIGINAL = xxhash.xxh3_128


@dataclass
class Counter:
    """Counts the bytes that are hashed, by step."""

    nbytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    step: str = ""

    def made(self, data: Any = b"") -> Counting:
        """Replaces the hash function."""
        return Counting(self, data)


class Counting:
    """A hash that counts what it is given."""

    def __init__(self, counter: Counter, data: Any) -> None:
        self._hash = ORIGINAL()
        self._counter = counter
        self.update(data)

    def update(self, data: Any) -> None:
        self._counter.nbytes[self._counter.step] += memoryview(data).nbytes
        self._hash.update(data)

    def digest(self) -> bytes:
        return bytes(self._hash.digest())

    def hexdigest(self) -> str:
        return str(self._hash.hexdigest())


@pytest.fixture(autouse=True)
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    found = Counter()
    monkeypatch.setattr(digests, "_REGISTRY", {digests.DEFAULT: found.made})
    monkeypatch.setattr(xxhash, "xxh3_128", found.made)
    monkeypatch.setattr(recording, "quantised_modules", lambda model: frozenset())  # it asks vLLM
    monkeypatch.setattr(recording, "overwritten_modules", lambda model: frozenset())  # so does this
    return found


class Model(torch.nn.Module):
    def __init__(self, seed: int, hidden: int = 512) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(2 * hidden, hidden)
        self.linears = [torch.nn.Linear(hidden, hidden) for _ in range(8)]
        self.layers = torch.nn.ModuleList(self.linears)
        self.norm = torch.nn.LayerNorm(hidden)
        self.head = torch.nn.Linear(hidden, 2 * hidden, bias=False)
        self.head.weight = self.embed.weight


def nbytes_of(model: torch.nn.Module) -> int:
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in named_raw_tensors(model).values()}.values())


def pulled_into(model: torch.nn.Module, counter: Counter) -> PullReport:
    """Pull the weights of another model."""
    identity = ModelIdentity(model="m")
    with sync.serve(named_raw_tensors(Model(1)), identity, host="127.0.0.1", transport="memory") as seed:
        counter.step = "pull"
        return sync.pull(named_raw_tensors(model), identity, sources=[seed.address], transport="memory")


def recorded_of(model: torch.nn.Module, counter: Counter, report: PullReport | None = None, **keep: Any) -> Record:
    counter.step = "record"
    pulled = None if report is None else report.announcement
    identity = ModelIdentity(model="m", fingerprint="ab" * 16)
    before, config = Before.of(model), Config(**keep)
    return record(model, before, lambda: identity, lambda _: (), config, "rank 0", pulled=pulled, serves=True)


def offered_of(model: torch.nn.Module, counter: Counter, found: Record) -> RawHolding:
    counter.step = "locate"
    assert found.recorded is not None
    located = found.recorded.raw.locate(model)
    assert located.lost == {}
    return raw_holding(found.recorded.announcement, found.recorded.device, located, "cd" * 16)


FEW = 4096
"""Bytes that names and shapes take: a manifest, a root."""

SAMPLE = 1024
"""Bytes of each larger tensor by which ways to compute it back are told apart."""


def samples(tensors: int) -> int:
    """Bytes of the samples of that many tensors, and those of names."""
    return tensors * SAMPLE + FEW


@pytest.mark.parametrize(
    ("keep", "sampled"),
    [({}, 10), ({"keep_raw": False}, 10), ({"int8_cache": "dram", "int8_cache_name": ("embed.weight",)}, 9)],
)
def test_weights_that_are_pulled_and_served_are_hashed_twice(
    keep: dict[str, Any], sampled: int, counter: Counter
) -> None:
    model = Model(2)
    nbytes = nbytes_of(model)
    found = recorded_of(model, counter, pulled_into(model, counter), **keep)
    made = offered_of(model, counter, found)
    assert nbytes <= counter.nbytes["pull"] < nbytes + FEW
    assert counter.nbytes["record"] < samples(sampled), "the pull has verified it"
    assert nbytes <= counter.nbytes["locate"] < nbytes + samples(sampled)
    assert made.announcement.root == found.root
    assert made.announcement.identity.fingerprint == "ab" * 16, "the announcement has the identity of this load"
    from_scratch = recorded_of(Model(1), counter).announcement
    assert from_scratch is not None
    assert made.announcement.digests == from_scratch.digests


def test_weights_that_are_loaded_and_served_are_hashed_twice(counter: Counter) -> None:
    model = Model(2)
    nbytes = nbytes_of(model)
    offered_of(model, counter, recorded_of(model, counter))
    assert nbytes <= counter.nbytes["record"] < nbytes + samples(10)
    assert nbytes <= counter.nbytes["locate"] < nbytes + samples(10)


def test_a_replaced_tensor_is_hashed_once_too(counter: Counter) -> None:
    model = Model(2)
    nbytes = nbytes_of(model)
    found = recorded_of(model, counter, pulled_into(model, counter))
    for layer in model.linears:
        layer.weight = torch.nn.Parameter(layer.weight.detach().flip(0).contiguous())
    made = offered_of(model, counter, found)
    assert sorted(made.located.kept) == [f"layers.{place}.weight" for place in range(8)]
    assert set(made.located.reasons.values()) == {Keep.REFERENCE}
    tried = 5 * 8  # ways back that have the shape and dtype
    assert nbytes <= counter.nbytes["locate"] < nbytes + samples(10 + tried)


def test_a_tensor_that_is_computed_back_is_hashed_once_and_not_for_a_client(counter: Counter) -> None:
    model = Model(2)
    nbytes = nbytes_of(model)
    found = recorded_of(model, counter, pulled_into(model, counter))
    for layer in model.linears:
        layer.weight = torch.nn.Parameter(layer.weight.detach().t().contiguous())
    made = offered_of(model, counter, found)
    assert sorted(made.located.inverses) == [f"layers.{place}.weight" for place in range(8)]
    assert made.located.kept.keys().isdisjoint(made.located.inverses)
    assert nbytes <= counter.nbytes["locate"] < nbytes + samples(10 + 8 * 3)
    counter.step = "serve"
    plan = made.announcement.plan
    for view in made.memory.views(plan, range(len(plan.blocks))):
        view.regions()
    assert counter.nbytes["serve"] == 0


def test_a_pulled_tensor_that_changed_is_not_served(counter: Counter) -> None:
    model = Model(2)
    found = recorded_of(model, counter, pulled_into(model, counter))
    assert found.recorded is not None
    with torch.no_grad():
        model.linears[3].weight[7, 11] += 1
    assert "layers.3.weight" in found.recorded.raw.locate(model).lost


def test_tensors_that_differ_from_the_pulled_ones_are_hashed_again(counter: Counter) -> None:
    model = Model(2)
    report = pulled_into(model, counter)
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
    found = recorded_of(model, counter, report)
    assert counter.nbytes["record"] >= nbytes_of(model)
    assert found.root != report.root


def test_a_block_that_differs_names_what_may_have_changed(counter: Counter) -> None:
    model = Model(2, hidden=64)
    found = recorded_of(model, counter)
    assert found.announcement is not None
    raw = RawWeights(model, found.announcement, keep_policy(frozenset(), Config()))
    with torch.no_grad():
        model.linears[0].weight[0, 0] += 1
    lost = raw.locate(model).lost
    assert set(lost.values()) == {"vLLM rewrote it in place, or a tensor of the same block"}
    assert "layers.0.weight" in lost
    assert not [name for name in lost if name.endswith("bias")], "these have copies"
