"""Which features of vLLM work: one test for each line of the table in docs/vllm.md."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from netloader.server.server import HoldingServer
from netloader.vllm.load import fill_model
from netloader.vllm.load.inspect_engine import Context
from netloader.vllm.model.support import why_not
from tests.models import ModelStore
from tests.vllm import harness
from tests.vllm.processors import WITHOUT, on_processor
from tests.vllm.pulls import LogLines, Seeds, extra, load, source_of

TABLE = Path(__file__).resolve().parents[2] / "docs" / "vllm.md"


def config() -> SimpleNamespace:
    """A configuration without special features."""
    return SimpleNamespace(
        # That of the target: a draft's own is another one.
        model_config=SimpleNamespace(quantization="bitsandbytes"),
        parallel_config=SimpleNamespace(enable_eplb=False, enable_elastic_ep=False),
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0)
        ),
    )


MODEL = SimpleNamespace(quantization=None)
PLAIN = {"w": torch.nn.Parameter(torch.zeros(2))}


def test_a_plain_model_has_nothing_that_speaks_against_it() -> None:
    assert why_not(config(), PLAIN, MODEL) == ""


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The port of each connection that a server of this process accepted."""
    ports: list[int] = []
    serve = HoldingServer._serve

    async def counted(self: HoldingServer, stream: Any) -> None:
        ports.append(self.port)
        await serve(self, stream)

    monkeypatch.setattr(HoldingServer, "_serve", counted)
    return ports


# --- works ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        pytest.param("llama-bf16", {"enable_lora": True}, id="lora"),
        pytest.param("qwen3-moe", {"enable_expert_parallel": True}, id="expert_parallel"),
    ],
)
def test_works(
    kind: str,
    arguments: dict[str, Any],
    seeds: Seeds,
    models: ModelStore,
    log_lines: LogLines,
    connections: list[int],
) -> None:
    seed = seeds.get(kind)
    log_lines.lines.clear()
    with source_of(seed.holding) as source:
        pulled = load(models.bare(kind), source, arguments=arguments)
    assert pulled.raw == seed.disk
    assert log_lines.one("serves target"), "and what was pulled is served"
    assert len(connections) >= 1


# --- falls back, or cannot run here ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [{"cpu_offload_gb": 1}, {"offload_group_size": 2}],
    ids=["uva", "prefetch"],
)
def test_cpu_offload_falls_back(
    arguments: dict[str, Any], seeds: Seeds, models: ModelStore, log_lines: LogLines, connections: list[int]
) -> None:
    seed = seeds.get("llama-bf16")
    log_lines.lines.clear()
    with source_of(seed.holding) as source:
        loaded = load(models.get("llama-bf16"), source, arguments=arguments)
    assert loaded.raw == seed.disk
    assert "CPU offload is on" in log_lines.one("the default loader")
    assert "CPU offload is on" in log_lines.one("does not serve its target")
    assert connections == []


@on_processor(WITHOUT)
def test_online_quantisation_falls_back(
    processor: str, seeds: Seeds, models: ModelStore, log_lines: LogLines, connections: list[int]
) -> None:
    """vLLM has no fp8 kernel for this processor, so it fails after the part that is tested."""
    seed = seeds.get("llama-bf16")
    log_lines.lines.clear()
    with source_of(seed.holding) as source, pytest.raises(Exception, match=r"fp8|FP8|kernel|scaled|quant"):
        load(models.get("llama-bf16"), source, arguments={"quantization": "fp8"})
    assert "online quantisation creates weights while they are loaded" in log_lines.one(
        "the default loader (auto) loads"
    )
    assert connections == []


def test_weights_without_memory_fall_back(falls_back: FallingBack) -> None:
    """The model is not quantised, so the line does not say that it is."""

    def empty(model: Any) -> None:
        norm = model.model.norm

        def fill(weight: Any, read: torch.Tensor) -> None:
            norm.weight = torch.nn.Parameter(read.to(weight.dtype), requires_grad=False)

        norm.weight = torch.nn.Parameter(norm.weight.data.to("meta"), requires_grad=False)
        norm.weight.weight_loader = fill

    falls_back("some weights have no memory before they are loaded (model.norm.weight)", rebuild=empty)


class Wrapped(torch.Tensor):
    """A tensor class that keeps its data in other tensors, as torchao's do."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None


@dataclass
class FallingBack:
    """A load with a source, whose configuration or model has a feature with which nothing can be pulled."""

    seeds: Seeds
    models: ModelStore
    log_lines: LogLines
    connections: list[int]
    monkeypatch: pytest.MonkeyPatch

    def __call__(
        self,
        reason: str,
        *,
        configure: Callable[[Any], object] = lambda config: None,
        rebuild: Callable[[Any], object] = lambda model: None,
    ) -> None:
        """The default loader gives its usual result, the reason is logged, and no source was contacted.

        Args:
            reason: Part of the line that names it.
            configure: Changes vLLM's configuration, which its own checks have passed already.
            rebuild: Changes the model that vLLM has built, before it gets its weights.
        """
        from vllm.model_executor.model_loader import base_loader

        seed = self.seeds.get("llama-bf16")
        self.log_lines.lines.clear()
        build = base_loader.initialize_model

        def initialize(*arguments: Any, **more: Any) -> Any:
            model = build(*arguments, **more)
            rebuild(model)
            return model

        self.monkeypatch.setattr(base_loader, "initialize_model", initialize)
        with source_of(seed.holding) as source:
            config = harness.engine_config(
                self.models.get("llama-bf16"), load_format="netloader", extra=extra([source])
            )
            configure(config)
            loaded = harness.load(config)
        assert loaded.raw == seed.disk
        assert reason in self.log_lines.one("the default loader (auto) loads the target")
        assert reason in self.log_lines.one("does not serve its target")
        assert self.connections == []


@pytest.fixture
def falls_back(
    seeds: Seeds,
    models: ModelStore,
    log_lines: LogLines,
    connections: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> FallingBack:
    return FallingBack(seeds, models, log_lines, connections, monkeypatch)


def test_a_tensor_of_a_special_class_falls_back(falls_back: FallingBack) -> None:
    def wrap(model: Any) -> None:
        weight = model.model.norm.weight.data.as_subclass(Wrapped)
        model.model.norm.weight = torch.nn.Parameter(weight, requires_grad=False)

    falls_back("tensors of a special class (model.norm.weight: Wrapped)", rebuild=wrap)


def test_the_name_of_a_method_that_vllm_no_longer_has_is_reason_enough() -> None:
    assert "bitsandbytes" in why_not(config(), PLAIN, SimpleNamespace(quantization="bitsandbytes"))


@pytest.mark.parametrize("method", ["torchao"])
def test_a_quantisation_that_fills_weights_in_its_own_way_falls_back(
    method: str, falls_back: FallingBack, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_default = fill_model.load_by_default

    def plain(context: Context, *arguments: Any) -> fill_model.Filled:
        # The files are not quantised, so the default loader has to load them without the method.
        context.engine.model_config.quantization = None
        filled = by_default(context, *arguments)
        context.engine.model_config.quantization = method
        return filled

    monkeypatch.setattr(fill_model, "load_by_default", plain)

    configs: list[Any] = []

    def quantise(model: Any) -> None:  # not earlier: the identity asks vLLM about it
        configs[0].model_config.quantization = method

    falls_back(f"quantisation {method} fills its weights in its own way", configure=configs.append, rebuild=quantise)


@pytest.mark.parametrize("field", ["enable_eplb", "enable_elastic_ep"])
def test_experts_that_move_fall_back(field: str, falls_back: FallingBack) -> None:
    falls_back("moves experts between ranks", configure=lambda config: setattr(config.parallel_config, field, True))


@pytest.mark.parametrize(
    "additional",
    [
        {"eplb_config": {"dynamic_eplb": True}},
        {"eplb_config": {"expert_map_record_path": "record.json"}},
        {"dynamic_eplb": True},
    ],
    ids=["dynamic", "recorded", "earlier release"],
)
def test_experts_that_vllm_ascend_moves_fall_back(additional: dict[str, Any], falls_back: FallingBack) -> None:
    falls_back("moves experts between ranks", configure=lambda config: setattr(config, "additional_config", additional))


def test_an_expert_map_that_cannot_be_read_falls_back(falls_back: FallingBack, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    falls_back(
        f"settings of the engine can't be compared: additional_config.eplb_config.expert_map_path names {path}, which",
        configure=lambda config: setattr(config, "additional_config", {"eplb_config": {"expert_map_path": str(path)}}),
    )


def test_weights_without_a_shape_fall_back(falls_back: FallingBack) -> None:
    from torch.nn.parameter import UninitializedParameter

    def fill(weight: Any, read: torch.Tensor) -> None:
        weight.materialize(read.shape, dtype=read.dtype)
        weight.data.copy_(read)

    def lazy(model: Any) -> None:
        weight: Any = UninitializedParameter(requires_grad=False)
        weight.weight_loader = fill
        model.model.norm.weight = weight

    falls_back("once the checkpoint is read (model.norm.weight)", rebuild=lazy)


class _Towers(torch.nn.Module):
    """A model with a vision tower beside its language model."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.LayerNorm(4))
        self.language_model = torch.nn.Linear(4, 4)


def test_towers_of_a_multimodal_model_travel_like_all_other_modules() -> None:
    from netloader.tensors import hold
    from netloader.vllm.model.snapshot import named_raw_tensors

    tensors = named_raw_tensors(_Towers())
    names = [spec.name for spec in hold(tensors, _identity()).announcement.manifest.tensors]
    assert "vision_tower.0.weight" in names
    assert why_not(config(), tensors, MODEL) == ""


def _identity() -> Any:
    from netloader.core.identity import ModelIdentity

    return ModelIdentity(model="m")


# --- the table ------------------------------------------------------------------------------------------------------


def test_every_line_of_the_table_names_a_test_that_there_is() -> None:
    section = TABLE.read_text(encoding="utf-8").partition("## Features of vLLM\n")[2].partition("\n## ")[0]
    _, _, *lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [
        re.fullmatch(r"\| [^|]+ \| (works|falls back|cannot run here)[^|]* \| [^|]+ \| `([\w./]+)::(\w+)` \|", line)
        for line in lines
    ]
    assert [line for line, row in zip(lines, rows, strict=True) if row is None] == []
    assert len(rows) >= 13
    folder = Path(__file__).parent
    for _, file, test in (row.groups() for row in rows if row is not None):
        path = folder.parent / file if "/" in file else folder / file
        assert f"def {test}(" in path.read_text(encoding="utf-8"), test


# --- beside vllm-ascend ---------------------------------------------------------------------------------------------

STAND_IN = """
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader


@register_model_loader("netloader")
class ModelNetLoaderElastic(BaseModelLoader):
    def download_model(self, model_config): ...
    def load_weights(self, model, model_config): ...
"""


@pytest.fixture
def ascend(needs_vllm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A stand-in for the package that registers a loader of the same name when a module of it is imported."""
    from vllm.model_executor import model_loader

    folder = tmp_path / "vllm_ascend" / "model_loader" / "netloader"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").touch()
    (folder / "netloader.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    known = dict(model_loader._LOAD_FORMAT_TO_MODEL_LOADER)
    for name in ("netloader", "netloader_p2p"):
        known.pop(name, None)
    monkeypatch.setattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", known)
    yield "vllm_ascend.model_loader.netloader.netloader"
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm_ascend"]:
        del sys.modules[name]


@pytest.mark.parametrize("theirs_first", [True, False])
def test_ours_is_the_one_whatever_is_imported_first(theirs_first: bool, ascend: str, log_lines: LogLines) -> None:
    import importlib

    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    from netloader.vllm.loader import loader_class
    from netloader.vllm.plugin import register

    if theirs_first:
        importlib.import_module(ascend)
    register()
    importlib.import_module(ascend)
    register()
    for name in ("netloader", "netloader_p2p"):
        assert type(get_model_loader(LoadConfig(load_format=name))) is loader_class()
    assert log_lines.one("netloader's loader replaces vllm_ascend", "ModelNetLoaderElastic")


def test_a_package_that_cannot_be_imported_does_no_harm(ascend: str, tmp_path: Path, log_lines: LogLines) -> None:
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    from netloader.vllm.loader import loader_class
    from netloader.vllm.plugin import register

    (tmp_path / "vllm_ascend/model_loader/netloader/netloader.py").write_text("import torch_npu_is_not_here")
    register()
    assert type(get_model_loader(LoadConfig(load_format="netloader"))) is loader_class()
    assert log_lines.one("could not be imported, which does no harm here")
