"""A quantisation method that the tests register. It changes weights as real methods do, on any CPU.

It transposes and replaces a weight. It derives tensors as plain attributes and in a helper object, and a number. It
leaves an empty placeholder. Each variant breaks one rule, which a server or a client has to notice.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.utils import is_weights_pre_processed, set_weight_attrs

from tests.models import PROCESSED_METHOD as NAME

VARIANT = types.SimpleNamespace(now="good")
"""The variant: ``good``, or one of the following names.

At a server: ``no flag``, ``handle``, ``emptied``, ``closure``, ``elsewhere``, ``opaque``. At either: ``number``. At a
client: ``apart`` (names that share memory at the server have memory of their own), ``wide`` (a derived tensor has
another dtype), ``again`` (it changes a tensor also when the weights are processed already), ``more`` (it sets an
attribute then).
"""


class Method(LinearMethodBase):
    """Transposes, derives, replaces."""

    @property
    def supports_pre_processed_weights(self) -> bool:
        return bool(VARIANT.now != "no flag")

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """A plain weight, as every checkpoint has it."""
        shape = (sum(output_partition_sizes), input_size_per_partition)
        weight = torch.nn.Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0})
        layer.register_parameter("weight", weight)
        set_weight_attrs(weight, attributes)

    def process_weights_after_loading(self, layer: Any) -> None:
        """The changes of several real methods in one."""
        if not is_weights_pre_processed():
            self._transform(layer)
        elif VARIANT.now == "again":
            layer.scale.mul_(2)
        elif VARIANT.now == "more":
            layer.times_processed = 2
        if VARIANT.now != "number":
            layer.largest = float(layer.scale.max())

    def _transform(self, layer: Any) -> None:
        weight = layer.weight.data
        scale = weight.float().abs().amax(dim=1).clamp(min=1e-6) / 127
        layer.weight = torch.nn.Parameter((weight / scale[:, None].to(weight.dtype)).t(), requires_grad=False)
        layer.scale = scale  # no parameter, no buffer
        # The same tensor by a second name, and a view of it by a third.
        layer.helper = types.SimpleNamespace(
            row_sums=layer.weight.float().sum(dim=0).to(torch.float32), same_scale=scale, first_scale=scale[:1]
        )
        layer.placeholder = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        if VARIANT.now == "number":
            layer.largest = float(scale.max())
        if VARIANT.now == "apart":
            layer.helper.same_scale = scale.clone()
        if VARIANT.now == "wide":
            layer.helper.row_sums = layer.helper.row_sums.double()
        if VARIANT.now == "elsewhere":
            layer.elsewhere = torch.empty(2, 4096, device="meta")
        if VARIANT.now == "empty elsewhere":
            layer.elsewhere = torch.empty(0, 7, device="meta")
        if VARIANT.now == "opaque":
            layer.opaque = object()
        if VARIANT.now == "handle":
            layer.handle = layer.weight.data_ptr()
        if VARIANT.now == "closure":
            hidden = scale.clone()
            layer.multiply = lambda x: x * hidden
        if VARIANT.now == "emptied":
            layer.packed = layer.weight.data.clone()
            layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """One module by two names: what is derived is shared as well."""
        return embed_tokens

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The product with the dequantised weight."""
        product: torch.Tensor = (x @ layer.weight) * layer.scale.to(x.dtype)
        return product if bias is None else product + bias

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, which is transposed by now."""
        rows: torch.Tensor = layer.weight.t()[input_] * layer.scale[input_, None].to(layer.weight.dtype)
        return rows


@register_quantization_config(NAME)
class Config(QuantizationConfig):
    """Applies the method to linear layers and embeddings alike."""

    @classmethod
    def get_name(cls) -> Any:
        """Its name in ``quantization_config``."""
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """All that the tests use."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """None."""
        return -1

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        """None beside the model's own."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Config:
        """It has no settings."""
        return cls()

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """The method, for all layers whose weights vLLM would otherwise keep in a closure on some CPUs."""
        return Method() if isinstance(layer, LinearBase | VocabParallelEmbedding) else None
