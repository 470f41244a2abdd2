"""Processed weights on a simulated NPU: offered after post-processing, pulled into the same structure, compared.

The adapter's parts that do not import vLLM are called as its loads call them (`hold_processed`, `adopt_processed`);
post-processing changes weights as engines on an NPU do. `tests/vllm/test_processed.py` has vLLM's own loads, on CPUs.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch_npu
from torch_npu import _hccl as sim
from torch_npu._traffic import traffic

import netloader
from netloader.codecs.npu_formats import format_of
from netloader.core.identity import ModelIdentity
from netloader.core.report import PullReport
from netloader.errors import NoSourceLeft
from netloader.tensors import hold
from netloader.vllm.load.processed_pull import Adopted, NotAdopted, check_adopted
from netloader.vllm.model.digest import digest_of
from netloader.vllm.model.object_walk import Survey
from netloader.vllm.model.processed import FACTS, survey
from tests.npu_sim.inside.kit import FRACTAL_NZ

SERVER, CLIENT = "npu:1", "npu:0"
IDENTITY = ModelIdentity(model="m", layout="processed")


class Layer(torch.nn.Module):
    """A module that keeps the results of post-processing."""

    weight: torch.nn.Parameter

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)


def built(device: str, seed: int | None) -> torch.nn.Module:
    """The model as loaded from a checkpoint; without a seed: as it is built, filled with zeros."""
    rng = torch.Generator().manual_seed(seed or 0)

    def values(*shape: int) -> torch.Tensor:
        made = torch.rand(shape, generator=rng) - 0.5
        return made if seed is not None else torch.zeros(shape)

    model = torch.nn.Module()
    model.embed = Layer(values(320, 64))
    model.proj = Layer(values(96, 64))
    model.large = Layer(values(700, 900))  # more than one block
    model.packed = Layer((values(256, 64) * 254).to(torch.int8))
    model.head = Layer(values(320, 64))
    return model.to(device)


def process(model: Any, *, again: bool = False) -> None:
    """Like engines on an NPU: tiles, transposed weights, scales on attributes, aliases, placeholders, numbers.

    Args:
        model: The model.
        again: The tensors exist already; only the other values are set.
    """
    if not again:
        model.head.weight = model.embed.weight  # tied
        for layer in (model.proj, model.large):
            weight = layer.weight.data
            scale = weight.abs().amax(dim=1).clamp(min=1e-6)
            turned = (weight / scale[:, None]).t()
            tiles = torch_npu.npu_format_cast(turned.contiguous(), FRACTAL_NZ)
            layer.weight = torch.nn.Parameter(tiles if layer is model.proj else turned, requires_grad=False)
            layer.scale = scale  # neither parameter nor buffer
            layer.scale_again = scale
            layer.first_scales = scale[:16]
            layer.helper = types.SimpleNamespace(row_sums=turned.sum(dim=0))
            layer.bias = torch.nn.Parameter(torch.empty(0, device=weight.device), requires_grad=False)
        tiles = torch_npu.npu_format_cast(model.packed.weight.data, FRACTAL_NZ)
        model.packed.weight = torch.nn.Parameter(tiles.view(torch.int32), requires_grad=False)
        model.packed.columns = 64
    for layer in (model.proj, model.large):
        layer.largest = float(layer.scale.max())


def surveyed(model: torch.nn.Module) -> Survey:
    found = survey(model, {})
    assert found.problems == []
    return found


def contents(model: torch.nn.Module) -> dict[str, str]:
    """Digests of everything, including plain values and the geometry of views."""
    return {name: digest_of(tensor) for name, tensor in surveyed(model).tensors.items()}


def seed_model(seed: int = 1) -> torch.nn.Module:
    model = built(SERVER, seed)
    process(model)
    return model


def client_model() -> torch.nn.Module:
    model = built(CLIENT, None)
    process(model)
    return model


@dataclass
class Tried:
    """An attempted pull, and how it ended."""

    report: PullReport | None = None
    error: NoSourceLeft | None = None


async def pull(served: Survey, into: Survey, transport: str = "hccl") -> Tried:
    """A pull as `adopt_processed` makes it, from what `hold_processed` offers."""
    traffic.journal.clear()
    tried = Tried()
    holding = hold(served.tensors, IDENTITY, weak=True, threads=1)
    async with netloader.Server(host="127.0.0.1", transport=transport, device=SERVER, fan_out=0) as server:
        server.add(holding)
        source = f"127.0.0.1:{server.port}"
        try:
            tried.report = await netloader.pull(into.tensors, IDENTITY, sources=[source], transport=transport)
        except NoSourceLeft as error:
            tried.error = error
    return tried


def adopt(model: torch.nn.Module, found: Survey, report: PullReport) -> Adopted:
    """The remaining steps of `adopt_processed`."""
    pulled = {name: digest_of(tensor) for name, tensor in found.tensors.items()}
    adopted = Adopted(report, pulled, found.tensors[FACTS].clone(), frozenset(found.facts))
    process(model, again=True)
    check_adopted(model, adopted)
    return adopted


def test_the_simulated_post_processing_leaves_all_kinds_of_tensors() -> None:
    found = surveyed(seed_model())
    assert {
        "proj.scale",
        "proj.scale_again",
        "proj.helper.row_sums",
        "proj.bias",
        "head.weight",
    } <= found.tensors.keys()
    assert found.tensors["proj.bias"].numel() == 0
    assert found.facts["proj.first_scales"].startswith("view of proj.scale at 0")
    assert {"proj.largest", "packed.columns"} <= found.facts.keys()
    assert {name for name, tensor in found.tensors.items() if format_of(tensor) == "fractal-nz"} == {
        "proj.weight",
        "packed.weight",
    }
    assert not found.tensors["large.weight"].is_contiguous()
    manifest = hold(found.tensors, IDENTITY, threads=1).announcement.manifest
    aliases = {spec.name: spec.alias_of for spec in manifest.tensors if spec.alias_of}
    assert aliases == {
        "head.weight": "embed.weight",
        "proj.scale_again": "proj.scale",
        "large.scale_again": "large.scale",
    }


@pytest.mark.parametrize("transport", ["hccl", "tcp"])
async def test_processed_weights_are_pulled_into_the_same_structure_and_are_equal(transport: str) -> None:
    seed, client = seed_model(), client_model()
    expected = contents(seed)
    before = contents(client)
    assert {name for name in expected if before[name] == expected[name]} == {"proj.bias", "large.bias"}
    places = {name: tensor.data_ptr() for name, tensor in surveyed(client).tensors.items() if name != FACTS}
    found = surveyed(client)
    tried = await pull(surveyed(seed), found, transport)
    assert tried.report is not None
    adopt(client, found, tried.report)
    assert contents(client) == expected
    after = surveyed(client)
    assert {name: after.tensors[name].data_ptr() for name in places} == places, "no tensor was moved"
    assert {format_of(after.tensors[f"{name}.weight"]) for name in ("proj", "packed")} == {"fractal-nz"}
    proj: Any = client.get_submodule("proj")
    assert proj.largest == seed.get_submodule("proj").largest
    assert proj.first_scales.data_ptr() == proj.scale.data_ptr() == proj.scale_again.data_ptr()
    assert client.get_parameter("head.weight") is client.get_parameter("embed.weight")


async def test_weights_of_another_seed_differ_in_every_tensor() -> None:
    """Control: the comparison above fails for every tensor that is not empty."""
    seed, other = seed_model(1), seed_model(2)
    ours, theirs = contents(seed), contents(other)
    assert {name for name in ours if ours[name] == theirs[name]} == {"proj.bias", "large.bias"}


async def test_a_number_that_post_processing_does_not_set_again_is_refused() -> None:
    seed, client = seed_model(), client_model()
    found = surveyed(client)
    packed: Any = seed.get_submodule("packed")
    packed.columns = 65
    tried = await pull(surveyed(seed), found)
    assert tried.report is not None
    with pytest.raises(NotAdopted, match=r"plain values differ .* packed\.columns \(here: int 64\)"):
        adopt(client, found, tried.report)


async def test_a_tensor_that_post_processing_changes_after_the_pull_is_refused() -> None:
    seed, client = seed_model(), client_model()
    found = surveyed(client)
    tried = await pull(surveyed(seed), found)
    assert tried.report is not None
    adopted = adopt(client, found, tried.report)
    client.get_parameter("proj.weight").data.mul_(2)
    with pytest.raises(NotAdopted, match=r"changed tensors that were pulled: proj\.weight"):
        check_adopted(client, adopted)


def renamed(model: Any) -> None:
    model.proj.scales = model.proj.scale
    del model.proj.scale, model.proj.scale_again, model.proj.first_scales


def gone(model: Any) -> None:
    del model.large.bias


def other_dtype(model: Any) -> None:
    model.proj.helper.row_sums = model.proj.helper.row_sums.to(torch.float16)


def other_shape(model: Any) -> None:
    model.proj.helper.row_sums = model.proj.helper.row_sums[:90].clone()


def other_rank(model: Any) -> None:
    model.proj.helper.row_sums = model.proj.helper.row_sums[:, None]


def other_stride(model: Any) -> None:
    model.large.weight = torch.nn.Parameter(model.large.weight.data.contiguous(), requires_grad=False)


def other_format(model: Any) -> None:
    weight = torch_npu.npu_format_cast(model.proj.weight.data, int(torch_npu.Format.ND))
    model.proj.weight = torch.nn.Parameter(weight, requires_grad=False)


def unpacked(model: Any) -> None:
    model.packed.weight = torch.nn.Parameter(model.packed.weight.data.view(torch.int8), requires_grad=False)


def untied(model: Any) -> None:
    model.head.weight = torch.nn.Parameter(model.head.weight.data.clone(), requires_grad=False)


@pytest.mark.parametrize("at_the_seed", [True, False], ids=["seed", "client"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (renamed, r"proj\.scale: (the server does not hold it|it is not expected here)"),
        (gone, r"large\.bias: (the server does not hold it|it is not expected here)"),
        (other_dtype, r"proj\.helper\.row_sums: dtype is 'float(32|16)' here and 'float(32|16)' at the server"),
        (other_shape, r"proj\.helper\.row_sums: shape is \(9., ?\) here"),
        (other_rank, r"proj\.helper\.row_sums: shape is \(96, ?1?\) here"),
        (other_stride, r"large\.weight: in memory it is in (row-major order|the order of strides)"),
        (other_format, r"proj\.weight: format is '(nd|fractal-nz)' here and '(nd|fractal-nz)' at the server"),
        (unpacked, r"packed\.weight: dtype is 'int(32|8)' here and 'int(32|8)' at the server"),
        (untied, r"head\.weight: (here it shares|here it has memory of its own)"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
async def test_every_difference_is_refused_before_the_first_byte(
    change: Callable[[Any], None], reason: str, at_the_seed: bool
) -> None:
    seed, client = seed_model(), client_model()
    change(seed if at_the_seed else client)
    found = surveyed(client)
    before, made = contents(client), len(sim.created)
    tried = await pull(surveyed(seed), found)
    assert tried.error is not None
    assert re.search(reason, str(tried.error))
    assert traffic.journal == []
    assert len(sim.created) == made, "no byte was sent, nor a communicator made"
    assert contents(client) == before


def test_a_model_with_an_emptied_weight_is_not_offered() -> None:
    model: Any = built(SERVER, 1)
    sizes = {name: tensor.nbytes for name, tensor in model.named_parameters()}
    process(model)
    assert survey(model, sizes).problems == []
    model.large.weight = torch.nn.Parameter(torch.empty(0, device=SERVER), requires_grad=False)
    (problem,) = survey(model, sizes).problems
    assert problem == "large.weight: it had 2520000 bytes, and is empty now: they are somewhere else"
