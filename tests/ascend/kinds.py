"""The kinds of models that are loaded: how each is made, and with which arguments the engine gets it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import models
from tests.ascend import checkpoints
from tests.ascend.checkpoints import Layout, Rule, experts, latent_attention, projections

Find = Callable[[str], Path]
"""The folder of a model: `Store.get`, or `Store.bare`."""

Arguments = Callable[[Find], dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        model: The name under which `Store` makes its files.
        title: What it is.
        schemes: Classes of vllm-ascend that have to have post-processed some of its layers.
        arguments: Of the engine, besides the usual ones.
        lost: The raw tensors of more than 4 KiB that are not computed back after post-processing: a server needs copies
            of these, and of nothing else.
    """

    model: str
    title: str
    schemes: tuple[str, ...] = ()
    arguments: Arguments = lambda find: {}
    lost: tuple[str, ...] = ()


@dataclass
class Store:
    """Makes each model once, below `root`."""

    root: Path
    _made: dict[str, Path] = field(default_factory=dict)

    def get(self, name: str) -> Path:
        """The folder of a model. Of each there is one with other weights, with `OTHER` at the end of its name."""
        if name not in self._made:
            make = _PLAIN.get(name) or models.KINDS.get(name)
            folder = self.root / name
            if make is not None:
                self._made[name] = make(folder)
            else:
                other = OTHER if name.endswith(OTHER) else ""
                source, rule, layout = _QUANTISED[name.removesuffix(OTHER)]
                self._made[name] = checkpoints.quantise(self.get(source + other), folder, rule, layout)
        return self._made[name]

    def bare(self, name: str) -> Path:
        """The same folder without weight files."""
        bare = f"{name}-bare"
        if bare not in self._made:
            self._made[bare] = models.strip_weights(self.get(name), self.root / bare)
        return self._made[bare]


OTHER = "-other"

_PLAIN: Mapping[str, Callable[[Path], Path]] = {
    "deepseek": checkpoints.make_deepseek,
    f"deepseek{OTHER}": lambda folder: checkpoints.make_deepseek(folder, seed=15),
    f"eagle{OTHER}": lambda folder: models.make_eagle(folder, seed=17),
    f"llama-w8a8{OTHER}": lambda folder: models.make_w8a8(folder, seed=13),
}

_NEW = "1.0.0"
_QUANTISED: Mapping[str, tuple[str, Rule, Layout]] = {
    "w8a8": ("llama-bf16", projections("W8A8"), Layout()),
    "w8a8-dynamic": ("llama-bf16", projections("W8A8_DYNAMIC"), Layout()),
    "w8a16": ("llama-bf16", projections("W8A16"), Layout()),
    "w8a8-mix": ("llama-bf16", projections("W8A8_MIX"), Layout()),
    "w4a8": ("llama-bf16", projections("W4A8_DYNAMIC"), Layout(_NEW, 64)),
    "w4a8-group-32": ("llama-bf16", projections("W4A8_DYNAMIC"), Layout(_NEW, 32)),
    "w4a8-old": ("llama-bf16", projections("W4A8_DYNAMIC"), Layout(group=64)),
    "w4a4": ("llama-bf16", projections("W4A4_DYNAMIC"), Layout()),
    "w4a4-flatquant": ("llama-bf16", projections("W4A4_FLATQUANT_DYNAMIC"), Layout()),
    "moe-w8a8": ("qwen3-moe", experts("W8A8_DYNAMIC"), Layout()),
    "moe-w4a8": ("qwen3-moe", experts("W4A8_DYNAMIC"), Layout(_NEW)),
    "moe-w4a8-group": ("qwen3-moe", experts("W4A8_DYNAMIC"), Layout(_NEW, 64)),
    "moe-w4a8-old": ("qwen3-moe", experts("W4A8_DYNAMIC"), Layout(group=64)),
    "deepseek-w8a8": ("deepseek", latent_attention, Layout()),
}


def _mtp(find: Find) -> dict[str, Any]:
    return {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}


def _eagle(find: Find) -> dict[str, Any]:
    draft = str(find("eagle"))
    return {"speculative_config": {"method": "eagle", "model": draft, "num_speculative_tokens": 1}}


def _consumer(find: Find) -> dict[str, Any]:
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_consumer"}
    return {"kv_transfer_config": connector, "max_num_batched_tokens": 512}


def _in_layers(layers: int, *names: str) -> tuple[str, ...]:
    return tuple(f"model.layers.{layer}.{name}" for layer in range(layers) for name in names)


def _of_experts(*names: str) -> tuple[str, ...]:
    """In each of the two layers of the Qwen3-MoE."""
    return _in_layers(2, *(f"mlp.experts.{name}" for name in names))


_PROJECTIONS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_LOST_WEIGHTS = _in_layers(4, *(f"{name}.weight" for name in _PROJECTIONS))
_SECOND = tuple(f"{w}_weight_{what}_second" for w in ("w13", "w2") for what in ("scale", "offset"))

_DYNAMIC, _STATIC, _FOUR = "AscendW8A8DynamicLinearMethod", "AscendW8A8LinearMethod", "AscendW4A8DynamicLinearMethod"
_EXPERTS, _FOUR_EXPERTS = "AscendW8A8DynamicFusedMoEMethod", "AscendW4A8DynamicFusedMoEMethod"
_PLAIN_EXPERTS = "AscendUnquantizedFusedMoEMethod"
_LATENT = (_STATIC, _DYNAMIC, _EXPERTS)

KINDS: Mapping[str, Kind] = {
    "llama": Kind("llama-bf16", "bf16, dense"),
    "qwen3-moe": Kind("qwen3-moe", "bf16, mixture of experts", (_PLAIN_EXPERTS,)),
    "deepseek": Kind("deepseek", "bf16, MLA and a mixture of experts", (_PLAIN_EXPERTS,)),
    "w8a8": Kind("w8a8", "W8A8 (static)", (_STATIC,)),
    "w8a8-dynamic": Kind("w8a8-dynamic", "W8A8_DYNAMIC", (_DYNAMIC,)),
    "w8a16": Kind("w8a16", "W8A16", ("AscendW8A16LinearMethod",)),
    "w8a8-mix": Kind("w8a8-mix", "W8A8_MIX", ("AscendW8A8PDMixLinearMethod",)),
    "w4a8": Kind(
        "w4a8",
        "W4A8_DYNAMIC, version 1.0.0, per group",
        (_FOUR,),
        lost=_in_layers(4, "mlp.gate_up_proj.weight_scale_second", "mlp.down_proj.weight_scale_second"),
    ),
    "w4a8-old": Kind(
        "w4a8-old",
        "W4A8_DYNAMIC, older version, per group",
        (_FOUR,),
        lost=_in_layers(
            4,
            *(f"{name}.weight" for name in _PROJECTIONS[:2]),
            *(f"{name}.{part}" for name in _PROJECTIONS[2:] for part in ("weight", "weight_scale_second")),
        ),
    ),
    "w4a4": Kind("w4a4", "W4A4_DYNAMIC", ("AscendW4A4LaosDynamicLinearMethod",), lost=_LOST_WEIGHTS),
    "w4a4-flatquant": Kind(
        "w4a4-flatquant",
        "W4A4_FLATQUANT_DYNAMIC",
        ("AscendW4A4FlatQuantDynamicLinearMethod",),
        lost=_LOST_WEIGHTS,
    ),
    "moe-w8a8": Kind("moe-w8a8", "experts W8A8_DYNAMIC", (_EXPERTS, _DYNAMIC)),
    "moe-w4a8": Kind(
        "moe-w4a8",
        "experts W4A8_DYNAMIC, version 1.0.0, per channel",
        (_FOUR_EXPERTS, _DYNAMIC),
        lost=_of_experts("w13_weight_scale", "w2_scale_bias"),
    ),
    "moe-w4a8-group": Kind(
        "moe-w4a8-group",
        "experts W4A8_DYNAMIC, version 1.0.0, per group",
        (_FOUR_EXPERTS, _DYNAMIC),
        lost=_of_experts("w13_weight_scale", *_SECOND, "w2_scale_bias"),
    ),
    "moe-w4a8-old": Kind(
        "moe-w4a8-old",
        "experts W4A8_DYNAMIC, older version, per group",
        (_FOUR_EXPERTS, _DYNAMIC),
        lost=_of_experts("w13_weight", "w2_weight", "w13_weight_scale", *_SECOND),
    ),
    "compressed-tensors": Kind("llama-w8a8", "compressed-tensors, int8 weights, dynamic activations", (_DYNAMIC,)),
    "deepseek-w8a8": Kind("deepseek-w8a8", "MLA: attention W8A8, the rest W8A8_DYNAMIC", _LATENT),
    "deepseek-w8a8-consumer": Kind(
        "deepseek-w8a8",
        "the same on a KV consumer (MLAPO)",
        _LATENT,
        _consumer,
        lost=_in_layers(2, "self_attn.fused_qkv_a_proj.weight", "self_attn.q_b_proj.weight"),
    ),
    "mtp": Kind("deepseek-w8a8", "the same with its MTP layer as a draft", _LATENT, _mtp),
    "eagle": Kind("llama-bf16", "bf16, dense, with an EAGLE draft", (), _eagle),
}
