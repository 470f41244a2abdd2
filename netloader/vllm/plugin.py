"""The entry point that makes ``--load-format netloader`` known to vLLM."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

from netloader.config import FORMAT_NAMES
from netloader.vllm.early_check import check_configuration_early
from netloader.vllm.logs import join_vllm_log

__all__ = ["register"]

log = logging.getLogger(__name__)

ASCEND_PACKAGE = "vllm_ascend"
ASCEND_LOADER = "vllm_ascend.model_loader.netloader.netloader"


def register() -> None:
    """Register the loader under each name of :data:`netloader.config.FORMAT_NAMES`. Raises nothing.

    vLLM calls this in every process that it starts, possibly more than once. Only the first call has an effect.
    """
    try:
        join_vllm_log()
        _let_ascend_register_first()
        _register()
        check_configuration_early()
    except Exception as error:
        log.error(  # noqa: TRY400 - the traceback is logged at debug level
            "netloader does not fit this vLLM, and its load formats are not registered: %s",
            f"{type(error).__name__}: {error}",
        )
        log.debug("netloader: the traceback of that error", exc_info=True)


def _register() -> None:
    from vllm.model_executor.model_loader import register_model_loader

    from netloader.vllm.loader import loader_class

    loader = loader_class()
    for name in FORMAT_NAMES:
        current = _registered(name)
        if current is loader:
            continue
        if current is not None:
            log.info(
                "load format %r: netloader's loader replaces %s.%s", name, current.__module__, current.__qualname__
            )
        register_model_loader(name)(loader)


def _let_ascend_register_first() -> None:
    # vllm-ascend registers a loader under the same name when one of its modules is first imported, and the last
    # registration wins. vLLM calls plugins in no defined order. So the module is imported now, before ours registers.
    # No other module is imported, because the other registrations of the package patch vLLM.
    if importlib.util.find_spec(ASCEND_PACKAGE) is None:
        return
    try:
        importlib.import_module(ASCEND_LOADER)
    except Exception as error:  # noqa: BLE001 - another package's import may fail in any way, without effect here
        log.info("vllm-ascend's own netloader could not be imported, which does no harm here: %s", error)


def _registered(name: str) -> type[Any] | None:
    """The loader class that vLLM has registered under `name`; None when there is none."""
    from vllm.model_executor import model_loader

    # The table is read, because vllm-ascend's loader connects to its sources when it is constructed.
    known: dict[str, type[Any]] = getattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", {})
    return known.get(name)
