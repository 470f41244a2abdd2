"""Tiny checkpoints as ModelSlim writes them: quantised weights, and `quant_model_description.json` that says how.

The names and shapes of the tensors are those that vllm-ascend reads; the values are random, and no scale is a default
that a loader could have left there.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.models import load_weights

if TYPE_CHECKING:
    import torch

FLOAT = "FLOAT"
Rule = Callable[[str], str]
"""From the name of a weight to the method that quantises it, or FLOAT."""


@dataclass(frozen=True)
class Layout:
    """What of a checkpoint depends on the release of ModelSlim that wrote it.

    Attributes:
        version: "1.0.0" packs two four-bit values into a byte.
        group: Values in a row that share a second scale; 0 without one.
    """

    version: str = "0"
    group: int = 0


def quantise(source: Path, target: Path, rule: Rule, layout: Layout | None = None) -> Path:
    """Write the model in `source`, quantised by `rule`, to `target`."""
    from safetensors.torch import save_file

    layout = layout or Layout()
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    described: dict[str, object] = {
        "model_quant_type": "W8A8",
        "version": layout.version,
        "group_size": layout.group,
    }
    written: dict[str, torch.Tensor] = {}
    for name, weight in load_weights(source).items():
        method = rule(name) if weight.dim() == 2 and name.endswith(".weight") else FLOAT
        parts = {name: weight} if method == FLOAT else METHODS[method](_Weight(name, weight, layout))
        written |= {part: tensor.contiguous() for part, tensor in parts.items()}
        described |= dict.fromkeys(parts, method)
    save_file(written, target / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(described, indent=1)
    (target / "quant_model_description.json").write_text(text, encoding="utf-8")
    return target


@dataclass(frozen=True)
class _Weight:
    name: str
    values: torch.Tensor
    layout: Layout

    @property
    def before(self) -> str:
        return self.name.removesuffix("weight")

    def random(self, *shape: int) -> torch.Tensor:
        """Values from 0 to 1, the same for a name in every run."""
        import torch

        return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(map(ord, self.name))))

    def rounded(self, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Its integers, and the scale of each output channel as a column."""
        import torch

        scale = self.values.float().abs().amax(dim=1, keepdim=True) / largest
        return (self.values.float() / scale).round().clamp(-largest - 1, largest).to(torch.int8), scale

    def named(self, **parts: torch.Tensor) -> dict[str, torch.Tensor]:
        return {self.before + part: tensor for part, tensor in parts.items()}


def _dynamic(weight: _Weight) -> dict[str, torch.Tensor]:
    values, scale = weight.rounded(127)
    dtype = weight.values.dtype
    return weight.named(weight=values, weight_scale=scale.to(dtype), weight_offset=scale.mul(0).to(dtype))


def _static(weight: _Weight) -> dict[str, torch.Tensor]:
    import torch

    rows = weight.values.shape[0]
    scale = weight.rounded(127)[1].flatten()
    more = weight.named(
        input_scale=torch.tensor([0.02], dtype=weight.values.dtype),
        input_offset=torch.tensor([3], dtype=torch.int8),
        quant_bias=weight.random(rows).mul(100).to(torch.int32),
        deq_scale=scale * 0.02,
    )
    return _dynamic(weight) | more


def _four_bits(weight: _Weight) -> dict[str, torch.Tensor]:
    rows, columns = weight.values.shape
    dtype = weight.values.dtype
    values, scale = weight.rounded(7)
    parts = weight.named(weight_scale=scale.to(dtype), weight_offset=scale.mul(0).to(dtype))
    if weight.layout.version == "1.0.0":
        values = (values[0::2] & 0xF) | (values[1::2] << 4)
        split = weight.name.endswith(("o_proj.weight", "down_proj.weight"))  # by rows: a bias for each of 16 ranks
        parts |= weight.named(scale_bias=weight.random(rows, 16 if split else 1))
    if weight.layout.group:
        second = weight.random(rows, columns // weight.layout.group).add(1).to(dtype)
        parts |= weight.named(weight_scale_second=second, weight_offset_second=second.mul(0))
    return parts | weight.named(weight=values)


def _four_by_four(weight: _Weight) -> dict[str, torch.Tensor]:
    values, scale = weight.rounded(7)
    return weight.named(weight=values, weight_scale=scale, weight_offset=scale.mul(0))


def _flat(weight: _Weight) -> dict[str, torch.Tensor]:
    import torch

    left, right = _factors(weight.values.shape[1])
    dtype = weight.values.dtype
    more = weight.named(
        left_trans=weight.random(left, left).to(dtype),
        right_trans=weight.random(right, right).sub(0.5).to(dtype),
        clip_ratio=torch.tensor([0.9]),
    )
    return _four_by_four(weight) | more


def _factors(n: int) -> tuple[int, int]:
    """The two factors of `n` that are closest to each other."""
    left = next(factor for factor in range(math.isqrt(n), 0, -1) if n % factor == 0)
    return left, n // left


METHODS: Mapping[str, Callable[[_Weight], dict[str, torch.Tensor]]] = {
    "W8A8": _static,
    "W8A8_MIX": _static,
    "W8A8_DYNAMIC": _dynamic,
    "W8A16": _dynamic,
    "W4A8_DYNAMIC": _four_bits,
    "W4A4_DYNAMIC": _four_by_four,
    "W4A4_FLATQUANT_DYNAMIC": _flat,
}


def projections(method: str) -> Rule:
    """All projections of all layers by one method."""
    return lambda name: method if name.endswith("_proj.weight") else FLOAT


def experts(method: str) -> Rule:
    """Experts by one method, the attention by W8A8_DYNAMIC."""
    return lambda name: method if ".experts." in name else projections("W8A8_DYNAMIC")(name)


def latent_attention(name: str) -> str:
    """A DeepSeek: the attention by W8A8 but for `kv_b_proj`, which vllm-ascend requires plain; the rest dynamic."""
    if not name.endswith(("_proj.weight", "_proj_with_mqa.weight")) or "kv_b_proj" in name or "eh_proj" in name:
        return FLOAT
    return "W8A8" if "self_attn" in name else "W8A8_DYNAMIC"


def make_deepseek(folder: Path, *, seed: int = 5) -> Path:
    """A DeepSeek-V3 of a dense layer, a layer of 8 experts, and an MTP layer in the same files."""
    import torch
    from safetensors.torch import save_file
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from tests.models import VOCABULARY, _change_config, _save

    hidden = 256
    config = DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        num_nextn_predict_layers=1,
    )
    _save(folder, DeepseekV3ForCausalLM, config, dtype="bfloat16", seed=seed)
    _change_config(folder, {"topk_method": "noaux_tc"})
    tensors = load_weights(folder)
    last, mtp = "model.layers.1.", "model.layers.2."
    copied = {mtp + name.removeprefix(last): t for name, t in tensors.items() if name.startswith(last)}
    tensors |= {name: t.flip(0).contiguous() for name, t in copied.items()}
    norms = ("enorm", "hnorm", "shared_head.norm")
    tensors |= {f"{mtp}{norm}.weight": torch.ones(hidden, dtype=torch.bfloat16) for norm in norms}
    random = torch.randn(hidden, 2 * hidden, generator=torch.Generator().manual_seed(seed))
    tensors[f"{mtp}eh_proj.weight"] = random.mul(0.05).to(torch.bfloat16)
    tensors[f"{mtp}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    tensors[f"{mtp}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
