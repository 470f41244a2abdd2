"""Parts of a model that vLLM has not built: a placeholder, and behind it a module without memory.

vLLM does so for the output head of a pooling model, and for an encoder whose inputs the configuration excludes
(``--limit-mm-per-prompt``). Nothing computes with such a part, and no checkpoint fills it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Module

__all__ = ["is_unbuilt"]


def is_unbuilt(module: Module) -> bool:
    """Whether `module` is vLLM's placeholder for a part without memory."""
    # Where vLLM has not imported the class, no module is of that class.
    placeholder = getattr(sys.modules.get("vllm.model_executor.models.utils"), "StageMissingLayer", None)
    if placeholder is None or not isinstance(module, placeholder):
        return False
    part: Module | None = vars(module).get("module")
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if part is not None:
        held += [*part.parameters(), *part.buffers()]
    return all(tensor.is_meta for tensor in held)
