"""Check netloader's configuration when vLLM reads its arguments, and not after half a minute of start-up.

The loader checks it too, but vLLM constructs the loader in its workers only, where an error comes late and stands
inside a long traceback. There is no callback for plugins that is given the arguments. So the method that turns the
arguments into the load configuration is wrapped, once.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from netloader.config import FORMAT_NAMES, load_config
from netloader.discovery.configured import registries_of
from netloader.errors import ConfigError

__all__ = ["check_configuration_early"]

log = logging.getLogger(__name__)

_ARGUMENTS = "vllm.engine.arg_utils"
_METHOD = "create_load_config"
_MARK = "_netloader_wrapped"


def check_configuration_early() -> None:
    """Have vLLM's arguments checked in this process, if it parses any. A second call changes nothing."""
    module = sys.modules.get(_ARGUMENTS)  # imported already, if this process parses arguments
    found = getattr(module, "EngineArgs", None)
    original = getattr(found, _METHOD, None)
    if not isinstance(found, type) or original is None or _MARK in vars(found):
        return
    setattr(found, _MARK, True)
    setattr(found, _METHOD, _checking(original))


def _checking(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create(self: Any, *arguments: Any, **options: Any) -> Any:
        _check(self)
        return original(self, *arguments, **options)

    return create


def _check(arguments: Any) -> None:
    """Check the configuration of a vLLM that is about to start.

    Raises:
        ConfigError: A field is not valid. The same text is a log line of its own.
    """
    extra = getattr(arguments, "model_loader_extra_config", None)
    if str(getattr(arguments, "load_format", "")).lower() not in FORMAT_NAMES or not isinstance(extra, Mapping):
        return
    if getattr(arguments, "distributed_executor_backend", None) == "ray" or getattr(arguments, "nnodes", 1) != 1:
        return  # workers on other hosts may have files that this host lacks; their loaders check the configuration
    try:
        registries_of(load_config(extra))
    except ConfigError as error:
        log.error("netloader: %s", error)  # noqa: TRY400 - the error itself goes on to vLLM
        raise error from None
