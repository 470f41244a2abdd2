"""A quantisation method that the tests register in the way of vllm-ascend's ModelSlim.

It names no file and reads `quant_model_description.json` itself. Whatever that says, its weights have the names, types
and shapes of the plain model's; what they mean differs.
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
    """A plain weight with a meaning."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind


@register_quantization_config(NAME)
class Config(QuantizationConfig):
    """As AscendModelSlimConfig: the description, read where vLLM lets a class look into the folder."""

    untold: Any = None
    """What the object shall have beside its description."""

    def __init__(self, description: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.description = dict(description or {})
        if Config.untold is not None:
            self.untold = Config.untold

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
        """What vllm-ascend does here; its keys change again when the model maps its names."""
        if not self.description:
            self.description = json.loads((Path(model_name) / DESCRIPTION).read_text(encoding="utf-8"))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.description = {f"mapped.{name}": kind for name, kind in self.description.items()}

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        return SlimMethod(str(self.description)) if isinstance(layer, LinearBase) else None


def described(plain: Path, folder: Path, kind: str) -> Path:
    """The model in `plain` as this method's, quantised by `kind` as its description says."""
    shutil.copytree(plain, folder)
    (folder / DESCRIPTION).write_text(json.dumps({"model.layers.0.mlp.down_proj.weight": kind}), encoding="utf-8")
    return folder


ARGUMENTS = {"quantization": NAME}
