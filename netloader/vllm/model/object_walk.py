"""Everything that the modules of a model hold: tensors and plain values by the path to them, and what is neither.

The walk goes through attributes, lists, mappings, objects, functions and their closures. It does not go into process
groups, which hold no weights and differ between engines, and leaves out the values of HARMLESS.
"""

from __future__ import annotations

import enum
import functools
import logging
import re
import sys
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from netloader.tensors.mappings import ANY, HEAP, mapped
from netloader.vllm.model.ascend_table import HARMLESS
from netloader.vllm.model.load_state import TRANSFERRED_FACTS
from netloader.vllm.model.registered import buffers_of, parameters_of, unset_names, weights_of
from netloader.vllm.model.unbuilt import is_unbuilt

if TYPE_CHECKING:
    import torch

__all__ = ["Outside", "Survey", "Walk", "handle_problem", "outside", "plain_values", "walked"]

_LOW_END = 1 << 32
"""Smaller numbers are often counts. They are taken for addresses only if they lie in this interpreter's heap."""

_DEVICE_ADDRESSES = range(1 << 40, 1 << 48)
"""Integers that are always taken for addresses, because a device's addresses may be mapped nowhere in this process. The
size of a layer in bytes is smaller."""

_PLAIN = (bool, int, float, str, bytes, complex, type(None))
_HARMLESS = (type, types.ModuleType, types.BuiltinFunctionType, logging.Logger, re.Pattern, range, slice)
_FOREIGN = ("vllm.config", "vllm.distributed", "vllm.platforms", "transformers", "logging", "threading")
"""Packages whose objects hold no weights, such as configuration, which identities compare."""

_OF_MODULES = re.compile(
    r"_(parameters|buffers|modules)|_non_persistent_buffers_set|.*_hooks.*|_is_full_backward_hook|training|_netloader_.*"
)

_GROUPS = (
    ("torch.distributed", "ProcessGroup"),
    ("torch._C._distributed_c10d", "Backend"),
    ("vllm.distributed.parallel_state", "GroupCoordinator"),
)
"""Base classes of process groups: modules and names. vllm-ascend and torch_npu derive their own from them."""


@dataclass
class Survey:
    """What a post-processed model holds.

    Attributes:
        tensors: All tensors to transfer, by name, on the model's device; the last one is FACTS.
        facts: Plain values as text, by name; also the position of views in other tensors.
        problems: Objects that have no name or can't be compared, with the reason.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outside:
    """The modules and tensors of a model that are not registered with their owner, by the path to them.

    Attributes:
        modules: Modules in a plain mapping, list or object, which `named_modules` does not reach.
        tensors: Tensors that are no parameter and no persistent buffer of any module: plain attributes, parts of
            objects, tensors in closures, computed buffers.
    """

    modules: Mapping[str, torch.nn.Module]
    tensors: Mapping[str, torch.Tensor]


def outside(model: torch.nn.Module) -> Outside:
    """Find the modules and tensors that `named_modules` of `model` does not reach."""
    walk = walked(model)
    weights = {id(t) for m in [*model.modules(), *walk.modules.values()] for _, t in weights_of(m)}
    return Outside(walk.modules, {n: t for n, t in [*walk.named.items(), *walk.hidden] if id(t) not in weights})


def plain_values(model: torch.nn.Module) -> dict[str, str]:
    """The plain values that the modules of `model` hold, as text, by the path to them."""
    return walked(model).found.facts


def walked(model: torch.nn.Module) -> Walk:
    """Walk through all modules of `model`."""
    walk = Walk()
    # All registered modules are marked first, so that each is named by its own path, also if another refers to it.
    modules = list(model.named_modules(remove_duplicate=False))
    walk.seen.update(id(module) for _, module in modules)
    for name, module in modules:
        walk.module(name, module)
    return walk


class Walk:
    """A walk through the modules of a model.

    Attributes:
        found: Plain values, and problems. Its tensors are not filled here.
        modules: The modules that are not registered with their parent.
        named: All tensors that are reached otherwise than by a function.
        empty: Names of tensors without elements, and of parameters and buffers that are None.
        hidden: Tensors in closures and default arguments.
        numbers: Numbers that are too large for a count, and that point to no mapped memory.
    """

    def __init__(self) -> None:
        self.found = Survey()
        self.modules: dict[str, torch.nn.Module] = {}  # those that are not registered with their parent
        self.named: dict[str, torch.Tensor] = {}
        self.empty: set[str] = set()
        self.hidden: list[tuple[str, torch.Tensor]] = []  # in closures
        self.seen: set[int] = set()
        self.alive: list[object] = []  # an id is unique only while its object is alive
        self.addresses = _Addresses()
        self.numbers: dict[str, int] = {}  # too large for a count, and not in mapped memory

    def module(self, name: str, module: torch.nn.Module) -> None:
        """Note everything that one module holds, without its submodules."""
        if is_unbuilt(module):
            return
        start = f"{name}." if name else ""
        for leaf in unset_names(module):
            self.empty.add(start + leaf)
            self.found.facts[start + leaf] = "None"
        for leaf, tensor in [*parameters_of(module), *buffers_of(module)]:
            self._tensor(start + leaf, tensor)
        for leaf, value in vars(module).items():
            if not _OF_MODULES.fullmatch(leaf) and (name or leaf not in TRANSFERRED_FACTS):  # those are in the identity
                self._attribute(module, start, leaf, value, closure=False)

    def _tensor(self, name: str, tensor: torch.Tensor) -> None:
        from torch.nn.parameter import is_lazy

        self.named[name] = tensor
        if not is_lazy(tensor) and not tensor.numel():  # an uninitialised parameter has no `numel`
            self.empty.add(name)

    def _value(self, name: str, value: Any, *, closure: bool) -> None:
        import torch

        if type(value) in _PLAIN:  # the most frequent case, and the fastest check
            self._plain(name, value)
        elif isinstance(value, torch.Tensor):
            if closure:
                self.hidden.append((name, value))
            else:
                self._tensor(name, value)
        elif isinstance(value, enum.Enum | torch.dtype | torch.Size | torch.layout | torch.memory_format):
            self.found.facts[name] = f"{type(value).__name__} {value!s}"
        elif isinstance(value, _PLAIN):
            self._plain(name, value)
        elif not isinstance(value, (*_HARMLESS, torch.device, torch.nn.Module, weakref.ref)):
            if id(value) not in self.seen:
                self.seen.add(id(value))
                self.alive.append(value)
                self._inside(name, value, closure=closure)
        elif isinstance(value, torch.nn.Module) and id(value) not in self.seen:
            # The module is not registered with its parent (it is in a list, for example), but it holds tensors.
            inside = list(value.named_modules())
            self.seen.update(id(module) for _, module in inside)
            for inner, module in inside:
                path = f"{name}.{inner}" if inner else name
                self.modules[path] = module
                self.module(path, module)

    def _plain(self, name: str, value: Any) -> None:
        if type(value) is int and value >= self.addresses.lowest:
            if value in self.addresses:
                self.found.problems.append(handle_problem(name, value))
            elif value in range(_LOW_END, _DEVICE_ADDRESSES.start):
                self.numbers[name] = value
        self.found.facts[name] = f"{type(value).__name__} {value!r}"

    def _inside(self, name: str, value: Any, *, closure: bool) -> None:
        if isinstance(value, Mapping):
            parts: Iterable[tuple[str, Any]] = [(f"{name}[{key}]", item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            parts = [(f"{name}[{place}]", item) for place, item in enumerate(value)]
        elif isinstance(value, set | frozenset):
            parts = [(f"{name}[{place}]", item) for place, item in enumerate(sorted(value, key=repr))]
        elif isinstance(value, types.FunctionType):
            self._function(name, value)
            return
        elif isinstance(value, types.MethodType):
            parts = [(f"{name}.self", value.__self__)]
        elif isinstance(value, functools.partial):
            parts = [(f"{name}.func", value.func), (f"{name}.args", value.args), (f"{name}.keywords", value.keywords)]
            closure = True
        else:
            self._object(name, value, closure=closure)
            return
        for part, item in parts:
            self._value(part, item, closure=closure)

    def _function(self, name: str, function: types.FunctionType) -> None:
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # not set yet
                continue
            self._value(f"{name}<closure>.{variable}", content, closure=True)
        for place, default in enumerate(function.__defaults__ or ()):
            self._value(f"{name}<defaults>[{place}]", default, closure=True)

    def _object(self, name: str, value: Any, *, closure: bool) -> None:
        kind = type(value)
        home = f"{kind.__module__}."
        if any(home.startswith(f"{package}.") for package in _FOREIGN) or isinstance(value, _groups()):
            return
        if home.startswith("torch._ops."):  # an operator: code
            return
        attributes = dict(_attributes(value))
        if not attributes and (home.startswith(("torch.", "builtins.", "_")) or not hasattr(value, "__dict__")):
            self.found.problems.append(f"{name}: {kind.__module__}.{kind.__qualname__} can't be looked into (a handle)")
            return
        for leaf, item in attributes.items():
            self._attribute(value, f"{name}.", leaf, item, closure=closure)

    def _attribute(self, owner: object, start: str, leaf: str, value: Any, *, closure: bool) -> None:
        if not (isinstance(value, _PLAIN) and _is_harmless(type(owner), leaf)):
            self._value(start + leaf, value, closure=closure)


class _Addresses:
    """Integers that may be addresses in this process.

    Attributes:
        lowest: The lowest such integer.
    """

    def __init__(self) -> None:
        self._heap = [range(start, end) for start, end in mapped(HEAP)]
        self._mapped: list[range] | None = None
        self.lowest = min([_LOW_END, *(heap.start for heap in self._heap)])

    def __contains__(self, value: int) -> bool:
        if value < _LOW_END:
            return any(value in heap for heap in self._heap)
        if value >= _DEVICE_ADDRESSES.start:
            return value < _DEVICE_ADDRESSES.stop
        if self._mapped is None:  # read on demand, because few models have such numbers
            self._mapped = [range(start, end) for start, end in mapped(ANY)]
        return not self._mapped or any(value in mapping for mapping in self._mapped)  # no mappings known: it may be one


def handle_problem(name: str, value: int) -> str:
    """The problem with a number that may be an address."""
    return f"{name}: the number {value} may be the address of something (a handle)"


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if not slot.startswith("__") and hasattr(value, slot):
                yield slot, getattr(value, slot)
    yield from getattr(value, "__dict__", {}).items()


def _groups() -> tuple[type, ...]:
    """The base classes of process groups whose modules are imported; without them there is no object of theirs."""
    found = (getattr(sys.modules.get(module), name, None) for module, name in _GROUPS)
    return tuple(kind for kind in found if isinstance(kind, type))


def _is_harmless(owner: type, leaf: str) -> bool:
    return leaf in HARMLESS and any(
        f"{kind.__module__}.{kind.__qualname__}" in HARMLESS[leaf].owners for kind in owner.__mro__
    )
