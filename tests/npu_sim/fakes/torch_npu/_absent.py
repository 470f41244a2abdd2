"""Modules of torch_npu and of CANN that others import at once and that are not simulated: their names, and errors."""

from __future__ import annotations

import sys
import types
from typing import Any


def missing(name: str) -> Any:
    """A function that can be imported, and raises when it is called."""

    def function(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} is not simulated")

    return function


class NotSimulated:
    """A class that can be named and derived from; there are no objects of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{type(self).__name__} is not simulated")


def module(name: str, **members: Any) -> types.ModuleType:
    """Make a module importable, and an attribute of its parent if there is one."""
    made = types.ModuleType(name)
    vars(made).update(members)
    sys.modules[name] = made
    parent, _, leaf = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], leaf, made)
    return made


def install() -> None:
    """Make all of them importable."""
    module("torch_npu.op_plugin")
    module("torch_npu.op_plugin.atb")
    # Called in each worker: it registers operators, and no operator is simulated.
    module("torch_npu.op_plugin.atb._atb_ops", _register_atb_extensions=lambda: None)
    names = ("start", "step", "stop")
    profiler = "torch_npu.profiler"
    module(profiler)
    module(f"{profiler}.dynamic_profile", **{name: missing(f"{profiler}.dynamic_profile.{name}") for name in names})
