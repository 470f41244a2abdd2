"""A post-processed model: all tensors by name, all plain values, and the objects that can't be compared.

vLLM's flag `supports_pre_processed_weights` is a statement about a method's code. It does not say what a layer holds:
on a CPU, a method may keep its weights in a handle or in a closure although the flag is set. So this module examines
every object that the modules hold. An object that is neither a tensor with a name nor a plain value is reported as a
problem, and then the processed layout is not offered.
"""

from __future__ import annotations

import enum
import functools
import logging
import re
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from netloader.errors import NetloaderError
from netloader.tensors.mappings import ANY, HEAP, mapped
from netloader.vllm.model.load_state import TRANSFERRED_FACTS
from netloader.vllm.model.registered import buffers_of, is_expert_map, parameters_of, unset_names, weights_of
from netloader.vllm.model.unbuilt import is_unbuilt

if TYPE_CHECKING:
    import torch

    from netloader.core.identity import ModelIdentity
    from netloader.core.protocol.events import Announcement
    from netloader.tensors import TensorMemory

__all__ = [
    "FACTS",
    "Outside",
    "ProcessedHolding",
    "Survey",
    "fact_names",
    "flag_problems",
    "hold_processed",
    "outside",
    "plain_values",
    "possible",
    "survey",
]

FACTS = "netloader.plain_state"
"""Name of the tensor with the digests of all plain values: one digest per value, in the order of their names."""

_DIGEST_BYTES = 16
_LOW_END = 1 << 32
"""Smaller numbers are often counts. They are taken for addresses only if they lie in this interpreter's heap."""

_DEVICE_ADDRESSES = range(1 << 40, 1 << 48)
"""Integers that are always taken for addresses, because a device's addresses may be mapped nowhere in this process. The
size of a layer in bytes is smaller."""

_PLAIN = (bool, int, float, str, bytes, complex, type(None))
_HARMLESS = (type, types.ModuleType, types.BuiltinFunctionType, logging.Logger, re.Pattern, range, slice)
_FOREIGN = ("vllm.config", "vllm.distributed", "vllm.platforms", "transformers", "logging", "threading")
"""Packages whose objects hold no weights: process groups, and configuration, which identities compare."""

_OF_MODULES = re.compile(
    r"_(parameters|buffers|modules)|_non_persistent_buffers_set|.*_hooks.*|_is_full_backward_hook|training|_netloader_.*"
)
_SMALL = 4096


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
class ProcessedHolding:
    """Processed tensors that can be served. Of these, only the tensor of plain values is kept alive here.

    Attributes:
        announcement: Its announcement, with the digests after post-processing.
        memory: Its blocks. It has weak references to the tensors.
        facts: The tensor with the digests of the plain values.
    """

    announcement: Announcement
    memory: TensorMemory
    facts: torch.Tensor

    @property
    def device(self) -> str:
        """The device of its tensors, as torch names it."""
        return self.memory.device


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
    walk = _walked(model)
    weights = {id(t) for m in [*model.modules(), *walk.modules.values()] for _, t in weights_of(m)}
    return Outside(walk.modules, {n: t for n, t in [*walk.named.items(), *walk.hidden] if id(t) not in weights})


def plain_values(model: torch.nn.Module) -> dict[str, str]:
    """The plain values that the modules of `model` hold, as text, by the path to them."""
    return _walked(model).found.facts


def possible() -> bool:
    """Whether this vLLM supports weights that are processed already (0.23 does not)."""
    from vllm.model_executor import utils
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    return hasattr(utils, "weights_already_processed") and hasattr(QuantizeMethodBase, "supports_pre_processed_weights")


def flag_problems(model: torch.nn.Module) -> list[str]:
    """The quantisation methods of `model` that do not declare that they support processed weights."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    without: dict[str, str] = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase) and not getattr(method, "supports_pre_processed_weights", False):
            without.setdefault(type(method).__name__, name)
    return [f"{name}: {method} does not declare supports_pre_processed_weights" for method, name in without.items()]


def survey(model: torch.nn.Module, raw_bytes: Mapping[str, int]) -> Survey:
    """Examine everything that the modules of a post-processed model hold.

    Args:
        model: The model.
        raw_bytes: Size of each parameter and buffer before post-processing. One that is empty now is a problem, because
            its contents are kept elsewhere.
    """
    walk = _walked(model)
    found = walk.found
    found.problems += _emptied(walk, raw_bytes)
    found.problems += _in_tensors(walk)
    _separate_views(walk)
    found.tensors[FACTS] = _facts_tensor(found.facts, next(iter(found.tensors.values())).device)
    return found


def fact_names(facts: Mapping[str, str], ours: torch.Tensor, theirs: torch.Tensor) -> list[str]:
    """Names of the plain values whose digests differ between two tensors of equal shape."""
    rows = (ours.cpu() != theirs.cpu()).any(dim=1).tolist()
    return [name for name, differs in zip(sorted(facts), rows, strict=True) if differs]


def _walked(model: torch.nn.Module) -> _Walk:
    walk = _Walk()
    # All registered modules are marked first, so that each is named by its own path, also if another refers to it.
    modules = list(model.named_modules(remove_duplicate=False))
    walk.seen.update(id(module) for _, module in modules)
    for name, module in modules:
        walk.module(name, module)
    return walk


class _Walk:
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
        if is_unbuilt(module):
            return
        start = f"{name}." if name else ""
        for leaf in unset_names(module):
            self.empty.add(start + leaf)
            self.found.facts[start + leaf] = "None"
        for leaf, tensor in [*parameters_of(module), *buffers_of(module)]:
            self.tensor(start + leaf, tensor)
        for leaf, value in vars(module).items():
            if not _OF_MODULES.fullmatch(leaf) and (name or leaf not in TRANSFERRED_FACTS):  # those are in the identity
                self.value(start + leaf, value, closure=False)

    def tensor(self, name: str, tensor: torch.Tensor) -> None:
        from torch.nn.parameter import is_lazy

        self.named[name] = tensor
        if not is_lazy(tensor) and not tensor.numel():  # an uninitialised parameter has no `numel`
            self.empty.add(name)

    def value(self, name: str, value: Any, *, closure: bool) -> None:
        import torch

        if type(value) in _PLAIN:  # the most frequent case, and the fastest check
            self.plain(name, value)
        elif isinstance(value, torch.Tensor):
            if closure:
                self.hidden.append((name, value))
            else:
                self.tensor(name, value)
        elif isinstance(value, enum.Enum | torch.dtype | torch.Size | torch.layout | torch.memory_format):
            self.found.facts[name] = f"{type(value).__name__} {value!s}"
        elif isinstance(value, _PLAIN):
            self.plain(name, value)
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

    def plain(self, name: str, value: Any) -> None:
        if type(value) is int and value >= self.addresses.lowest:
            if value in self.addresses:
                self.found.problems.append(_handle_problem(name, value))
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
            self.value(part, item, closure=closure)

    def _function(self, name: str, function: types.FunctionType) -> None:
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # not set yet
                continue
            self.value(f"{name}<closure>.{variable}", content, closure=True)
        for place, default in enumerate(function.__defaults__ or ()):
            self.value(f"{name}<defaults>[{place}]", default, closure=True)

    def _object(self, name: str, value: Any, *, closure: bool) -> None:
        kind = type(value)
        home = f"{kind.__module__}."
        if any(home.startswith(f"{package}.") for package in _FOREIGN):
            return
        if home.startswith("torch._ops."):  # an operator: code
            return
        attributes = dict(_attributes(value))
        if not attributes and (home.startswith(("torch.", "builtins.", "_")) or not hasattr(value, "__dict__")):
            self.found.problems.append(f"{name}: {kind.__module__}.{kind.__qualname__} can't be looked into (a handle)")
            return
        for leaf, item in attributes.items():
            self.value(f"{name}.{leaf}", item, closure=closure)


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


def _in_tensors(walk: _Walk) -> list[str]:
    """Problems with numbers that are addresses in a tensor. A device's memory may be mapped nowhere in this process."""
    if not walk.numbers:
        return []
    tensors = [tensor for tensor in [*walk.named.values(), *(t for _, t in walk.hidden)] if tensor.numel()]
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    spans = {range(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages}
    return [
        _handle_problem(name, value) for name, value in walk.numbers.items() if any(value in span for span in spans)
    ]


def _handle_problem(name: str, value: int) -> str:
    return f"{name}: the number {value} may be the address of something (a handle)"


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if not slot.startswith("__") and hasattr(value, slot):
                yield slot, getattr(value, slot)
    yield from getattr(value, "__dict__", {}).items()


def _emptied(walk: _Walk, raw_bytes: Mapping[str, int]) -> list[str]:
    return [
        f"{name}: it had {raw_bytes[name]} bytes, and is empty now: they are somewhere else"
        for name in sorted(walk.empty)
        if raw_bytes.get(name)
    ]


def _separate_views(walk: _Walk) -> None:
    """Separate the named tensors into tensors to transfer, and views of those and expert maps, which are facts.

    Check closures too.
    """
    from netloader.vllm.model.digest import digest_of

    found = walk.found
    owners: dict[int, tuple[str, torch.Tensor]] = {}  # by storage: its largest tensor
    home = next((t.device for t in walk.named.values() if t.numel()), None)
    for name, tensor in walk.named.items():
        if tensor.numel() and tensor.device == home:
            key = tensor.untyped_storage().data_ptr()
            if key not in owners or owners[key][1].nbytes < tensor.nbytes:
                owners[key] = (name, tensor)
    for name, tensor in walk.named.items():
        if is_expert_map(name.rpartition(".")[2], tensor):
            found.facts[name] = f"map {digest_of(tensor)}"  # it follows from the configuration
            continue
        if home is not None and tensor.device != home:
            _elsewhere(found, name, tensor)
            continue
        owner, whole = (
            owners.get(tensor.untyped_storage().data_ptr(), (name, tensor)) if tensor.numel() else ("", tensor)
        )
        if not tensor.numel() or _same(tensor, whole) or not _inside(tensor, whole):
            found.tensors[name] = tensor
        else:
            offset = tensor.data_ptr() - whole.data_ptr()
            found.facts[name] = f"view of {owner} at {offset}: {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}"
    for name, tensor in walk.hidden:
        known = tensor.numel() and tensor.untyped_storage().data_ptr() in owners
        if tensor.numel() and not known:
            found.problems.append(f"{name}: a function keeps a tensor of {tensor.nbytes} bytes that has no other name")


def _elsewhere(found: Survey, name: str, tensor: torch.Tensor) -> None:
    from netloader.vllm.model.digest import digest_of

    if not tensor.numel():  # a placeholder without contents to transfer
        found.facts[name] = f"{tensor.device.type} empty {tensor.dtype} {tuple(tensor.shape)}"
    elif tensor.is_meta or tensor.nbytes > _SMALL:
        found.problems.append(f"{name}: it is on {tensor.device}, apart from the other tensors")
    else:
        found.facts[name] = f"{tensor.device.type} {digest_of(tensor)}"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())


def _inside(tensor: torch.Tensor, whole: torch.Tensor) -> bool:
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    end = tensor.data_ptr() + (last + 1) * tensor.element_size()
    return whole.data_ptr() <= tensor.data_ptr() and end <= whole.data_ptr() + whole.nbytes


def _facts_tensor(facts: Mapping[str, str], device: torch.device) -> torch.Tensor:
    import torch
    import xxhash

    rows = b"".join(xxhash.xxh3_128(f"{name}\0{facts[name]}".encode()).digest() for name in sorted(facts))
    flat = torch.frombuffer(bytearray(rows or bytes(_DIGEST_BYTES)), dtype=torch.uint8)
    return flat.reshape(-1, _DIGEST_BYTES).to(device)


def hold_processed(
    model: torch.nn.Module, identity: ModelIdentity, raw_bytes: Mapping[str, int]
) -> tuple[ProcessedHolding | None, str]:
    """The holding of a post-processed model, or the reason why it can't be served exactly.

    Args:
        model: The model.
        identity: The identity of its raw weights.
        raw_bytes: See :func:`survey`.
    """
    from netloader.tensors import hold

    if not possible():
        return None, "this vLLM does not know processed weights"
    found = survey(model, raw_bytes)
    problems = [*flag_problems(model), *found.problems]
    if problems:
        more = f" and {len(problems) - 2} more" if len(problems) > 2 else ""  # noqa: PLR2004 - two fit into a line
        return None, "; ".join(problems[:2]) + more
    try:
        held = hold(found.tensors, msgspec.structs.replace(identity, layout="processed"), weak=True)
    except NetloaderError as error:
        return None, str(error)
    return ProcessedHolding(held.announcement, held.memory, found.tensors[FACTS]), ""
