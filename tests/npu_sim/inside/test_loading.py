"""A load as an engine on an NPU does it: record raw tensors, post-process weights, offer originals, pull them.

The parts of the adapter that do not import vLLM are called in the order of a load, with the post-processing of
vLLM-Ascend between them.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch_npu
from torch_npu import _memory as memory

import netloader
from netloader.config import Config
from netloader.core.identity import ModelIdentity
from netloader.core.plan import make_plan
from netloader.core.report import PullReport
from netloader.tensors import TensorHolding, digest_of, hold
from netloader.vllm.model.copies import Copies, Keep
from netloader.vllm.model.snapshot import Located, RawWeights, named_raw_tensors
from netloader.vllm.serve.raw_holding import RawHolding, raw_holding
from netloader.vllm.serve.retention import copy_log_lines, hint_for, keep_policy, kept_text
from tests.npu_sim.inside.kit import FRACTAL_NZ

SERVER, CLIENT = "npu:1", "npu:0"
QUANTISED = frozenset({"int8", "packed", "twice"})


@pytest.fixture(autouse=True)
def no_limit() -> Iterator[None]:
    gc.collect()  # so that memory of earlier tests counts as free from the start
    limit = memory.accounts.limit
    yield
    memory.accounts.limit = limit


def _weights(rows: int, columns: int, seed: int) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-128, 127, (rows, columns), generator=generator, dtype=torch.int8)
    return torch.nn.Parameter(values, requires_grad=False)


class Layer(torch.nn.Module):
    def __init__(self, **parameters: torch.nn.Parameter) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)


def small_model(seed: int, device: str) -> torch.nn.Module:
    """Plain, int8 and four-bit layers, as a checkpoint loader leaves them."""
    torch.manual_seed(seed)
    model = torch.nn.Module()
    model.embed = torch.nn.Embedding(320, 64)
    model.plain = torch.nn.Linear(64, 96)
    scale = torch.nn.Parameter(torch.rand(128, 1))
    model.int8 = Layer(weight=_weights(128, 96, seed), scale=scale)
    model.packed = Layer(weight=_weights(256, 64, seed + 1))
    model.twice = Layer(weight=_weights(1600, 1600, seed + 2))  # more than one block
    return model.to(device)


def process(model: torch.nn.Module, *, in_place: str = "") -> None:
    """What vLLM-Ascend does: tiles for matrix kernels, int8 transposed, four-bit weights packed, scales dropped."""
    plain, int8, packed, twice = (
        model.get_parameter(f"{name}.weight") for name in ("plain", "int8", "packed", "twice")
    )
    plain.data = torch_npu.npu_format_cast(plain.data, FRACTAL_NZ)
    int8.data = torch_npu.npu_format_cast(int8.data.t().contiguous(), FRACTAL_NZ)
    del model.get_submodule("int8").scale
    tiles = torch_npu.npu_format_cast(packed.data, FRACTAL_NZ).view(torch.int32)
    model.get_submodule("packed").weight = torch.nn.Parameter(tiles, requires_grad=False)
    turned = twice.data.t().contiguous()
    model.get_submodule("twice").weight = torch.nn.Parameter(turned, requires_grad=False)
    if in_place:
        weight = model.get_parameter(in_place)
        weight.data.copy_(weight.data.flip(0).contiguous())


@dataclass
class Loaded:
    located: Located
    copies: Mapping[Keep, Copies]
    lines: list[tuple[int, str]]
    offer: Callable[[], RawHolding]


def held(model: torch.nn.Module) -> TensorHolding:
    """The raw tensors that it offers."""
    return hold(named_raw_tensors(model), ModelIdentity(model="m"))


def load(model: torch.nn.Module, *, in_place: str = "", **fields: Any) -> Loaded:
    """A load with these settings: recorded, post-processed, layout chosen."""
    config = Config(**fields)
    holding = held(model)
    announcement, device = holding.announcement, holding.device
    del holding
    raw = RawWeights(model, announcement, keep_policy(QUANTISED, config))
    copies = dict(raw.copies)
    lines = list(copy_log_lines(raw.copies))
    process(model, in_place=in_place)
    located = raw.locate(model)
    return Loaded(located, copies, lines, lambda: raw_holding(announcement, device, located, "ab" * 16))


async def pull(model: torch.nn.Module, from_: RawHolding, transport: str) -> PullReport:
    async with netloader.Server(host="127.0.0.1", transport=transport, device=SERVER, fan_out=0) as server:
        server.add(from_)
        return await netloader.pull(named_raw_tensors(model), sources=[f"127.0.0.1:{server.port}"], transport=transport)


def on_host(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in named_raw_tensors(model).items()}


def wrong(model: torch.nn.Module, expected: Mapping[str, torch.Tensor]) -> list[str]:
    return [name for name, values in on_host(model).items() if not torch.equal(values, expected[name])]


@pytest.mark.parametrize("transport", ["hccl", "tcp"])
@pytest.mark.parametrize(("setting", "device"), [("dram", "cpu"), ("hbm", SERVER)])
async def test_originals_are_kept_where_keep_raw_says_and_can_be_pulled(
    setting: str, device: str, transport: str
) -> None:
    model = small_model(1, SERVER)
    expected = on_host(model)
    loaded = load(model, int8_cache=setting)
    assert loaded.located.lost == {}
    kept = {name: str(tensor.device) for name, tensor in loaded.located.kept.items()}
    assert kept == {
        "int8.weight": device,
        "int8.scale": device,  # a parameter of its module, whatever its size
        "twice.weight": device,
        "packed.weight": device,
    }
    nbytes = sum(expected[name].nbytes for name in kept)
    assert kept_text(loaded.located) == f"originals kept: INT8_CACHE={setting}: {nbytes} bytes on {device}"
    assert "plain.weight" in loaded.located.live, "tiles hold the same values: it is served where it lies"
    client = small_model(50, CLIENT)
    assert len(wrong(client, expected)) == len(expected)
    await pull(client, loaded.offer(), transport)
    assert wrong(client, expected) == []
    process(client)
    assert wrong(client, on_host(model)) == [], "and makes the same engine"


async def test_host_copies_need_little_device_memory() -> None:
    model = small_model(2, SERVER)
    loaded = load(model, int8_cache="dram")
    offer = loaded.offer()
    plan = make_plan(offer.announcement.manifest, 64 << 10)
    free = torch.npu.mem_get_info(SERVER)[0]  # type: ignore[attr-defined]
    blocks = offer.memory.views(plan, range(len(plan.blocks)))
    for block in blocks:
        digest_of(block, "xxh3-128")
        block.tensors()
    used = free - torch.npu.mem_get_info(SERVER)[0]  # type: ignore[attr-defined]
    assert used <= 2 * 64 * 96 * 4, "the plain form of one tensor in tiles, and nothing of what is in the host's memory"


@pytest.mark.parametrize("transport", ["hccl", "tcp"])
async def test_a_full_device_sends_all_copies_to_the_host(transport: str) -> None:
    model = small_model(3, SERVER)
    expected = on_host(model)
    announcement = held(model).announcement
    used = memory.accounts.used[1]
    room = 1 << 20  # for the smaller ones only, and for the needs of post-processing
    memory.accounts.limit = used + room
    config = Config(int8_cache="hbm")
    raw = RawWeights(model, announcement, keep_policy(QUANTISED, config))
    assert memory.accounts.used[1] - used < room // 2, "none stays on the device"
    lines = list(copy_log_lines(raw.copies))
    memory.accounts.limit = 64 << 30
    warnings = [line for level, line in lines if level == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith("INT8_CACHE=hbm: the device is full, the copies go to the host's memory (NPU out of")
    assert "bytes on cpu" in lines[-1][1]
    process(model)
    located = raw.locate(model)
    assert located.lost == {}
    assert str(located.kept["twice.weight"].device) == "cpu"
    client = small_model(60, CLIENT)
    await pull(client, raw_holding(announcement, SERVER, located, "ab" * 16), transport)
    assert wrong(client, expected) == []


async def test_without_copies_what_can_be_computed_back_is_and_the_rest_is_named() -> None:
    """Tiles of a matrix that was not transposed have no way back by blocks. `int8.weight` is in the same block."""
    model = small_model(4, SERVER)
    located = load(model).located
    assert located.lost == {"packed.weight": "vLLM replaced it"}
    assert hint_for(located.lost, QUANTISED, Config()) == "set INT8_CACHE to dram or hbm on the server"
    steps = {name: way.steps for name, way in located.inverses.items()}
    assert steps == {"twice.weight": ("transpose",)}


@pytest.mark.parametrize("transport", ["hccl", "tcp"])
async def test_only_what_is_listed_is_copied_and_the_rest_is_computed(transport: str) -> None:
    model = small_model(7, SERVER)
    expected = on_host(model)
    loaded = load(model, int8_cache="dram", int8_cache_name=("packed.weight",), keep_raw=False)
    located = loaded.located
    assert located.lost == {}
    assert set(located.kept) == {"packed.weight", "int8.scale"}
    text = kept_text(located)
    assert "INT8_CACHE=dram: 16384 bytes on cpu" in text
    assert text.endswith("2 tensors computed from processed ones")
    client = small_model(70, CLIENT)
    await pull(client, loaded.offer(), transport)
    assert wrong(client, expected) == []


def test_what_is_computed_comes_after_all_that_the_engine_has_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(11, SERVER)
    waited: list[str] = []
    monkeypatch.setattr(torch_npu.npu, "synchronize", lambda device=None: waited.append(str(device)))
    raw = RawWeights(model, held(model).announcement, keep_policy(QUANTISED, Config()))
    assert waited == [SERVER]
    process(model)
    raw.locate(model)
    assert waited == [SERVER, SERVER]


def test_a_full_device_computes_nothing_and_serves_what_it_can(caplog: pytest.LogCaptureFixture) -> None:
    model = small_model(8, SERVER)
    announcement = held(model).announcement
    memory.accounts.limit = memory.accounts.used[1] + (1 << 20)
    raw = RawWeights(model, announcement, keep_policy(QUANTISED, Config()))
    memory.accounts.limit = 64 << 30
    assert "npu:1 is full, so no raw tensor is computed" in caplog.text
    process(model)
    located = raw.locate(model)
    assert set(located.lost) == {"int8.weight", "packed.weight", "twice.weight"}
    assert located.inverses == {}


def test_the_scratch_memory_is_there_before_the_engine_measures_its_own() -> None:
    model = small_model(9, SERVER)
    config = Config(int8_cache="dram", int8_cache_name=("packed.weight",))
    raw = RawWeights(model, held(model).announcement, keep_policy(QUANTISED, config))
    process(model)
    located = raw.locate(model)
    measured = memory.accounts.used[1]
    offer = raw_holding(raw.announcement, SERVER, located, "ab" * 16)
    plan = offer.announcement.plan
    views = offer.memory.views(plan, range(len(plan.blocks)))
    computed = [view for view in views if "computed" in repr(view)]
    assert computed
    for view in computed:
        view.regions()
    assert memory.accounts.used[1] == measured
    unchanged = small_model(9, SERVER)
    used = memory.accounts.used[1]
    without = RawWeights(unchanged, held(unchanged).announcement, keep_policy(QUANTISED, config))
    assert without.locate(unchanged).scratch is None
    assert memory.accounts.used[1] == used, "it is freed if nothing is computed"


def test_a_rewrite_in_place_destroys_an_original_kept_by_reference_and_not_a_copy() -> None:
    name = "embed.weight"
    lost = load(small_model(5, SERVER), in_place=name, int8_cache="dram").located.lost
    why = "vLLM rewrote it in place, or a tensor of the same block"
    assert lost == {name: why, "plain.weight": why}
    assert "list these names in INT8_CACHE_NAME" in hint_for(lost, QUANTISED, Config(int8_cache="dram"))
    every = (name, "int8.weight", "packed.weight", "twice.weight")
    model = small_model(5, SERVER)
    expected = on_host(model)
    loaded = load(model, in_place=name, int8_cache="dram", int8_cache_name=every)
    assert loaded.located.lost == {}
    assert torch.equal(loaded.located.kept[name], expected[name])


def test_copies_of_unchanged_tensors_are_freed() -> None:
    model = small_model(6, SERVER)
    announcement = held(model).announcement
    used = memory.accounts.used[1]
    raw = RawWeights(model, announcement, keep_policy(QUANTISED, Config(int8_cache="hbm")))
    assert memory.accounts.used[1] > used
    located = raw.locate(model)
    assert located.kept == {}
    assert memory.accounts.used[1] == used
