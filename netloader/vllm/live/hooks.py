"""Retract what is served before vLLM changes the weights: by sleep, reload, or an update in place.

vLLM has no callback for that. So the methods of the worker's class that change weights are wrapped, once. A wrapper
first retracts what is served (clients get "gone" and continue at another source), and then calls the method. Methods
that a release of vLLM does not have are left out. A change that no wrapper sees can't give a client wrong weights,
because the client verifies the digests that were announced after the load.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from netloader.config import FORMAT_NAMES
from netloader.errors import ManifestError, NetloaderError
from netloader.vllm.serve.guard import serving_only
from netloader.vllm.serve.serving import ROLES, running_server

__all__ = ["CAPTURES", "CHANGES", "DISCARDS", "PROFILES", "WAKES", "pause_transfers_until_profiled", "wrap_worker"]

log = logging.getLogger(__name__)

CHANGES = (
    "sleep",
    "reload_weights",
    "reset_weights",
    "start_weight_update",
    "start_draft_weight_update",
    "update_weights",
    "elastic_ep_execute",
)
"""Methods of a worker that change weights in place. Target and draft are retracted together: they may share tensors."""

DISCARDS = "discard"
"""The method that frees memory by tags and saves nothing. With the tag of weights, it changes them."""

WAKES = "wake_up"
PROFILES = "determine_available_memory"

CAPTURES = "compile_or_warm_up_model"
"""The method in which graphs are captured. Operations that others queue on the device can spoil a capture."""

_NO_SLEEP = ("vllm.v1.worker.cpu_worker",)
"""Workers without sleep mode: `sleep` and `wake_up` only log that, and `discard` raises an error."""

_WEIGHTS = "weights"
"""vLLM's tag for the memory of weights."""

_RETRY_AFTER = 5.0
_LONGEST_PROFILE = 600.0

_MARK = "_netloader_wrapped"


def wrap_worker(worker_class: str) -> bool:
    """Wrap the methods of the worker's class, if this process has such a worker. A second call changes nothing.

    Args:
        worker_class: Full name of the class, as in vLLM's `ParallelConfig.worker_cls`.

    Returns:
        Whether the class is wrapped.
    """
    module_name, _, name = worker_class.rpartition(".")
    module = sys.modules.get(module_name)  # imported already, if the worker is in this process
    found = getattr(module, name, None)
    if not isinstance(found, type):
        log.debug("netloader: no worker class %s in this process: nothing changes its weights in place", worker_class)
        return False
    if _MARK in vars(found):
        return True
    setattr(found, _MARK, True)
    for method in CHANGES:
        if method != "sleep" or module_name not in _NO_SLEEP:
            _wrap(found, method, functools.partial(_around_change, method))
    if module_name not in _NO_SLEEP:
        _wrap(found, WAKES, _around_wake_up)
        _wrap(found, DISCARDS, _around_discard)
    _wrap(found, PROFILES, _around_profiling)
    _wrap(found, CAPTURES, _around_capture)
    return True


def pause_transfers_until_profiled(device: str) -> None:
    """Open and close no communicator on an NPU until vLLM has measured its memory. Clients are told when to retry.

    Transfers resume after ten minutes at the latest, for an engine that does not measure.
    """
    from netloader.transports.hccl.devices import hold_still

    if not device.startswith("npu"):
        return
    try:
        hold_still(
            _numbered(device), "the engine is measuring its memory", retry_after=_RETRY_AFTER, longest=_LONGEST_PROFILE
        )
    except NetloaderError as error:
        log.warning("netloader: a transfer goes on while vLLM measures its memory: %s", error)


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name, None)
    if original is None:
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    setattr(owner, name, wrapped)


def _around_change(method: str, original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    from netloader.vllm.live.reloading import abandon_reload, finish_reload

    # If our loader provides the weights, it retracts later: when all new weights are pulled and verified.
    iterator = args[0] if args else kwargs.get("weights_iterator")
    ours = method == "reload_weights" and iterator is None and _uses_netloader(worker)
    server = running_server()
    if server is not None and not ours:
        # Only after sleep may the same bytes come back. After another change, originals would only take memory.
        stop_serving = server.pause if method == "sleep" else server.retract
        with serving_only(f"retracting what is served before {method}", server):
            stop_serving(ROLES, f"the weights are about to change ({method})")
    if not ours:
        return original(worker, *args, **kwargs)
    try:
        result = original(worker, *args, **kwargs)
    except BaseException:
        with serving_only("cleaning up after a reload that failed", server):
            abandon_reload(worker.model_runner.get_model())
        raise
    with serving_only("serving after a reload", server):
        finish_reload(worker.model_runner.get_model())
    return result


def _around_discard(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    tags = args[0] if args else kwargs.get("tags")
    if tags is not None and _WEIGHTS not in tags:
        return original(worker, *args, **kwargs)
    return _around_change(DISCARDS, original, worker, *args, **kwargs)


def _uses_netloader(worker: Any) -> bool:
    return getattr(worker.vllm_config.load_config, "load_format", "") in FORMAT_NAMES


def _around_wake_up(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(worker, *args, **kwargs)
    tags = args[0] if args else kwargs.get("tags")
    server = running_server()
    if server is not None and (tags is None or _WEIGHTS in tags):
        with serving_only("serving again after wake_up", server):
            try:
                server.resume("they woke up")
            except ManifestError as error:
                log.warning("netloader: what was served before sleep is not served any more: %s", error)
    return result


def _around_profiling(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    from netloader.transports.hccl.devices import move_again

    try:
        return original(worker, *args, **kwargs)
    finally:
        with serving_only("letting transfers go on after vLLM has measured its memory", running_server()):
            move_again(_numbered(str(getattr(worker, "device", ""))))


def _around_capture(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    server = running_server()
    with ExitStack() as stack:
        if server is not None:
            with serving_only("pausing computations while graphs are captured", server):
                stack.enter_context(server.computes_nothing())
        return original(worker, *args, **kwargs)


def _numbered(device: str) -> str:
    """The name of the NPU with its number. vLLM names only the device type once its worker has chosen a device."""
    if device != "npu":
        return device
    import torch

    return f"npu:{torch.get_device_module('npu').current_device()}"
