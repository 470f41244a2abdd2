"""vLLM's own loaders, which can fill a model that is built already."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from netloader.config import FORMAT_NAMES
from netloader.errors import ConfigError

__all__ = ["fallback_loader"]

# Formats whose loader cannot fill a model in place. `ipc_cache` maps processed tensors of another process.
_NOT_IN_PLACE = ("ipc_cache",)


def fallback_loader(load_config: Any, load_format: str, extra: Mapping[str, Any]) -> Any:
    """The loader for `load_format`, with vLLM's other load settings unchanged.

    Args:
        load_config: vLLM's load configuration.
        load_format: FALLBACK_FORMAT.
        extra: FALLBACK_CONFIG, passed to that loader.

    Raises:
        ConfigError: vLLM has no such format, its loader can't fill a model in place, or rejects `extra`.
    """
    from vllm.model_executor.model_loader import get_model_loader

    if load_format in (*FORMAT_NAMES, *_NOT_IN_PLACE):
        raise ConfigError(
            field="FALLBACK_FORMAT",
            value=load_format,
            allowed="a load format of vLLM that reads weights from storage, such as auto or safetensors",
        )
    changed = dataclasses.replace(load_config, load_format=load_format, model_loader_extra_config=dict(extra))
    try:
        return get_model_loader(changed)
    except ValueError as error:
        raise ConfigError(
            field="FALLBACK_FORMAT",
            value=load_format,
            allowed="a load format that this vLLM knows, with a FALLBACK_CONFIG that its loader accepts",
            reason=str(error),
        ) from error
