"""A quantisation method that the tests register, similar to ModelSlim of vllm-ascend.

It names no file, and reads `quant_model_description.json` itself. Its weights always have the names, dtypes and shapes
of the plain model. Their meaning depends on the description.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

NAME = "netloader_slim"
DESCRIPTION = "quant_model_description.json"


class SlimMethod(UnquantizedLinearMethod):
    """A plain weight whose meaning depends on `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind


@register_quantization_config(NAME)
class Config(QuantizationConfig):
    """Like AscendModelSlimConfig: reads the description when vLLM lets a class read the model's folder."""

    opaque: Any = None
    """An attribute that the object gets in addition to its description."""

    def __init__(self, description: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.description = dict(description or {})
        if Config.opaque is not None:
            self.opaque = Config.opaque

    @classmethod
    def get_name(cls) -> Any:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Config:
        return cls(config)

    def maybe_update_config(self, model_name: str, **_: Any) -> None:
        """As in vllm-ascend. The keys change again when the model maps its names."""
        if not self.description:
            self.description = json.loads((Path(model_name) / DESCRIPTION).read_text(encoding="utf-8"))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.description = {f"mapped.{name}": kind for name, kind in self.description.items()}

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        return SlimMethod(str(self.description)) if isinstance(layer, LinearBase) else None


def described(plain: Path, folder: Path, kind: str) -> Path:
    """A copy of the model in `plain`, with a description that says `kind`."""
    shutil.copytree(plain, folder)
    (folder / DESCRIPTION).write_text(json.dumps({"model.layers.0.mlp.down_proj.weight": kind}), encoding="utf-8")
    return folder


ARGUMENTS = {"quantization": NAME}
