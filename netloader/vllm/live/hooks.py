"""Clients are told before the weights they pull are slept, reloaded or updated in place.

vLLM has no notice for that. So the methods of the worker's class that change weights are wrapped, once: what is served
is retracted first (clients get "gone" and go on elsewhere), then the method runs. Names that are not there in a version
of vLLM are left out; what slips through fails at the client all the same: announced digests are those of load time.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

from netloader.config import FORMAT_NAMES
from netloader.errors import ManifestError, NetloaderError
from netloader.vllm.serve.guard import serving_only
from netloader.vllm.serve.serving import ROLES, running_server

__all__ = ["CHANGES", "PROFILES", "WAKES", "hold_still_until_profiled", "watch_worker"]

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

WAKES = "wake_up"
PROFILES = "determine_available_memory"

_NO_SLEEP = ("vllm.v1.worker.cpu_worker",)
"""Where `sleep` and `wake_up` only say that they are not supported."""

_ASK_AGAIN = 5.0
_LONGEST_PROFILE = 600.0

_MARK = "_netloader_watches"


def watch_worker(worker_class: str) -> bool:
    """Wrap the methods of the worker's class, where this process has such a worker; calling it again changes nothing.

    Args:
        worker_class: Its full name, as vLLM's `ParallelConfig.worker_cls` has it.

    Returns:
        Whether the class is watched.
    """
    module_name, _, name = worker_class.rpartition(".")
    module = sys.modules.get(module_name)  # a worker of this process has been imported
    found = getattr(module, name, None)
    if not isinstance(found, type):
        log.debug("netloader: no worker class %s in this process: nothing changes its weights in place", worker_class)
        return False
    if _MARK in vars(found):
        return True
    setattr(found, _MARK, True)
    for method in CHANGES:
        if method != "sleep" or module_name not in _NO_SLEEP:
            _wrap(found, method, functools.partial(_changing, method))
    if module_name not in _NO_SLEEP:
        _wrap(found, WAKES, _waking)
    _wrap(found, PROFILES, _profiling)
    return True


def hold_still_until_profiled(device: str) -> None:
    """Open and close no communicator on an NPU until vLLM has measured its memory; clients are told when to ask again.

    Ends by itself after ten minutes, for an engine that never measures.
    """
    from netloader.transports.hccl.devices import hold_still

    if not device.startswith("npu"):
        return
    try:
        hold_still(
            _numbered(device), "the engine is measuring its memory", retry_after=_ASK_AGAIN, longest=_LONGEST_PROFILE
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


def _changing(method: str, original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    from netloader.vllm.live.reloading import abandon_reload, finish_reload

    # Where our loader is asked for the weights it retracts later: when all that is to come is there and verified.
    given = args[0] if args else kwargs.get("weights_iterator")
    ours = method == "reload_weights" and given is None and _pulls(worker)
    server = running_server()
    if server is not None and not ours:
        # After sleep the same bytes may come back; after the others they don't, and copies are not worth their memory.
        give_up = server.pause if method == "sleep" else server.retract
        with serving_only(f"retracting what is served before {method}", server):
            give_up(ROLES, f"the weights are about to change ({method})")
    if not ours:
        return original(worker, *args, **kwargs)
    try:
        result = original(worker, *args, **kwargs)
    except BaseException:
        with serving_only("letting go of a reload that broke", server):
            abandon_reload(worker.model_runner.get_model())
        raise
    with serving_only("serving after a reload", server):
        finish_reload(worker.model_runner.get_model())
    return result


def _pulls(worker: Any) -> bool:
    return getattr(worker.vllm_config.load_config, "load_format", "") in FORMAT_NAMES


def _waking(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(worker, *args, **kwargs)
    tags = args[0] if args else kwargs.get("tags")
    server = running_server()
    if server is not None and (tags is None or "weights" in tags):
        with serving_only("serving again after wake_up", server):
            try:
                server.resume("they woke up")
            except ManifestError as error:
                log.warning("netloader: what was served before sleep is not served any more: %s", error)
    return result


def _profiling(original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    from netloader.transports.hccl.devices import move_again

    try:
        return original(worker, *args, **kwargs)
    finally:
        with serving_only("letting transfers go on after vLLM has measured its memory", running_server()):
            move_again(_numbered(str(getattr(worker, "device", ""))))


def _numbered(device: str) -> str:
    """The NPU by its number: vLLM names it by its kind alone, once its worker has chosen which one that is here."""
    if device != "npu":
        return device
    import torch

    return f"npu:{torch.get_device_module('npu').current_device()}"
