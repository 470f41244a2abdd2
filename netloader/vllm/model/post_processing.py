"""Whether this engine can take over processed weights, and by which rules.

vLLM has a contract for that since 0.32: post-processing runs under `weights_already_processed`, and its methods declare
`supports_pre_processed_weights`. vllm-ascend's methods know nothing of it, and in its newer releases a function of its
own takes the place of vLLM's and does not heed it. Under vllm-ascend a table of classes says what is known.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from netloader.vllm.model.ascend_processed import AscendContract, why_not_known
from netloader.vllm.model.ascend_table import PACKAGE
from netloader.vllm.model.release import release_of_engine

if TYPE_CHECKING:
    import torch

__all__ = ["Contract", "VllmContract", "contract", "possible"]

_OF_VLLM = "vllm.model_executor.model_loader.utils.process_weights_after_loading"
"""vLLM's own post-processing."""


class Contract(Protocol):
    """How processed weights are taken over: post-process a model once, fill its tensors, then finish."""

    def unknown(self, model: torch.nn.Module) -> list[str]:
        """What of a model is not covered, as far as that is known before it is post-processed."""

    def undeclared(self, model: torch.nn.Module) -> list[str]:
        """What of a post-processed model is not covered."""

    def emptied(self, model: torch.nn.Module) -> frozenset[str]:
        """Names of parameters that post-processing empties although nothing is lost."""

    def finish(self, model: torch.nn.Module, model_config: Any, device: torch.device) -> None:
        """Derive, after the tensors were filled, what is no tensor."""

    def skipping(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """Meanwhile, vLLM's post-processing of `model` changes no tensor."""


def contract() -> tuple[Contract | None, str]:
    """The rules of this engine; or None, and why there are none."""
    release = release_of_engine()
    if release.package == PACKAGE:
        reason = why_not_known(release)
        return (None, reason) if reason else (AscendContract(), "")
    if not possible():
        return None, "this vLLM does not know processed weights"
    return VllmContract(), ""


def possible() -> bool:
    """Whether this vLLM supports weights that are processed already (0.23 does not)."""
    from vllm.model_executor import utils
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    return hasattr(utils, "weights_already_processed") and hasattr(QuantizeMethodBase, "supports_pre_processed_weights")


class VllmContract:
    """vLLM's own rules."""

    def unknown(self, model: torch.nn.Module) -> list[str]:
        """Code of other packages that may not heed vLLM's rules."""
        from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
        from vllm.model_executor.model_loader.utils import process_weights_after_loading

        where = _full_name(process_weights_after_loading)
        if where != _OF_VLLM:
            return [f"{where} replaces vLLM's post-processing, and may not heed that weights are processed already"]
        inherited: dict[str, str] = {}
        for name, module in model.named_modules():
            method = getattr(module, "quant_method", None)
            declares = isinstance(method, QuantizeMethodBase) and getattr(
                method, "supports_pre_processed_weights", False
            )
            if declares and not _speaks_for_itself(type(method)):
                inherited.setdefault(type(method).__name__, name)
        return [f"{name}: {method} only inherits supports_pre_processed_weights" for method, name in inherited.items()]

    def undeclared(self, model: torch.nn.Module) -> list[str]:
        """The quantisation methods of `model` that do not declare that they support processed weights."""
        from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

        without: dict[str, str] = {}
        for name, module in model.named_modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, QuantizeMethodBase) and not getattr(method, "supports_pre_processed_weights", False):
                without.setdefault(type(method).__name__, name)
        return [f"{name}: {method} does not declare supports_pre_processed_weights" for method, name in without.items()]

    def emptied(self, model: torch.nn.Module) -> frozenset[str]:  # noqa: ARG002
        """None: whatever is emptied is held elsewhere."""
        return frozenset()

    def finish(self, model: torch.nn.Module, model_config: Any, device: torch.device) -> None:
        """Post-process once more, for weights that are processed already."""
        from vllm.model_executor.model_loader.utils import process_weights_after_loading

        with self.skipping(model):
            process_weights_after_loading(model, model_config, device)

    def skipping(self, model: torch.nn.Module) -> AbstractContextManager[None]:  # noqa: ARG002
        """The mode that vLLM has for that."""
        from vllm.model_executor.utils import weights_already_processed

        mode: AbstractContextManager[None] = weights_already_processed()
        return mode


def _full_name(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _speaks_for_itself(method: type) -> bool:
    """Whether what a class declares is about its own post-processing.

    A class of another package may derive from one of vLLM's, replace its post-processing and inherit the declaration.
    """
    for kind in method.__mro__:
        if "supports_pre_processed_weights" in vars(kind) or kind.__module__.partition(".")[0] == "vllm":
            return True
        if "process_weights_after_loading" in vars(kind):
            return False
    return True
