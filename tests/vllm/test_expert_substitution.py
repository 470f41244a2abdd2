"""Constant values in the place of experts, by the newest release's own code around the model of this release.

A checkpoint names in its `config.json` the experts that it has no weights for (vLLM 0.33, MoNE). vLLM wraps the model's
class and adds a tensor of constants to each such layer. Which row belongs to which expert follows from that list alone:
two lists of equal length give tensors of equal names and shapes, and pulled across them a wrong model.
"""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from netloader.errors import NetloaderError
from tests.contract.names import NEWEST
from tests.contract.sources import Sources
from tests.models import ModelStore, rewrite_weights
from tests.vllm.pulls import offered, pull, source_of
from tests.wheels import sources_of

pytestmark = pytest.mark.usefixtures("needs_vllm")

KIND = "qwen3-moe"
EXPERTS, HIDDEN = 8, 128
LAYER = "model.layers.0.mlp.experts"


def newest() -> dict[str, Any]:
    """The names of the newest release that this test needs; what its code uses beside torch is left out of it."""
    from collections.abc import Iterable, Mapping
    from dataclasses import dataclass, field
    from functools import wraps

    def no_reload(*_: object) -> None:
        raise AssertionError("nothing is reloaded here")

    names: dict[str, Any] = {
        "torch": torch,
        "nn": torch.nn,
        "Any": Any,
        "Mapping": Mapping,
        "Iterable": Iterable,
        "wraps": wraps,
        "dataclass": dataclass,
        "field": field,
        "finalize_layerwise_reload": no_reload,
        "_T": TypeVar("_T", bound=torch.nn.Module),
    }
    sources = Sources(sources_of("vllm", NEWEST))
    for module, left_out in (
        ("vllm.model_executor.layers.fused_moe.expert_substitution", {"SubstitutedRoutedExperts"}),
        ("vllm.model_executor.models.expert_substitution", {"_T"}),
    ):
        tree = sources.tree(module)
        assert tree is not None
        kinds = (ast.FunctionDef, ast.ClassDef, ast.Assign)
        wanted = [node for node in tree.body if isinstance(node, kinds) and getattr(node, "name", "") not in left_out]
        tree = ast.Module([node for node in wanted if ast.unparse(node).partition(" ")[0] not in left_out], [])
        exec(compile(tree, f"vLLM {NEWEST}", "exec"), names)
    return names


@pytest.fixture
def substituting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of this vLLM are built as by the newest release."""
    from vllm.model_executor.model_loader import base_loader
    from vllm.model_executor.model_loader.utils import get_model_architecture

    names, build = newest(), base_loader.initialize_model

    def initialize(vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        base, _ = get_model_architecture(model_config)

        class Substituted(base):  # type: ignore[misc, valid-type]
            def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
                super().__init__(vllm_config=vllm_config, prefix=prefix)
                for number, layer in enumerate(self.model.layers):
                    path = f"model.layers.{number}.mlp.experts"
                    made = names["make_expert_substitution"](model_config, path, EXPERTS, HIDDEN, model_config.dtype)
                    if made is not None:
                        layer.mlp.experts.expert_substitution = made

        wrapped = names["as_expert_substitution_model"](Substituted, model_config)
        assert wrapped is not Substituted
        return build(vllm_config=vllm_config, model_config=model_config, prefix=prefix, model_class=wrapped)

    monkeypatch.setattr(base_loader, "initialize_model", initialize)


def checkpoint(source: Path, folder: Path, experts: Iterable[int], *, weights: bool = True) -> Path:
    """A checkpoint in which these experts of layer 0 are constants."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "approximate_experts": {"0": list(experts)}}), "utf-8")

    def with_constants(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        constants = {
            f"{LAYER}.{expert}.approx_value": torch.full((HIDDEN,), float(row), dtype=torch.bfloat16)
            for row, expert in enumerate(experts)
        }
        return {**tensors, **constants}

    if weights:
        rewrite_weights(folder, with_constants)
    return folder


def test_constants_travel_and_another_list_of_experts_is_refused_by_name(
    substituting: None, models: ModelStore, tmp_path: Path
) -> None:
    full, bare = models.get(KIND), models.bare(KIND)
    seed, holding = offered(checkpoint(full, tmp_path / "seed", [1, 4]), {})
    (values,) = [name for name in seed.raw if name.endswith("expert_substitution.values")]
    same = checkpoint(bare, tmp_path / "same", [1, 4], weights=False)
    # Without weight files there is no fingerprint, so nothing else tells the two apart.
    other = checkpoint(bare, tmp_path / "other", [1, 5], weights=False)
    with source_of(holding) as source:
        pulled = pull(same, source, FALLBACK=False)
        assert pulled.raw == seed.raw
        assert pulled.model.get_parameter(values)[:, 0].tolist() == [0.0, 1.0]
        with pytest.raises(NetloaderError, match="the identities differ: expert_placement is 'maps "):
            pull(other, source, FALLBACK=False)
