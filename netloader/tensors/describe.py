"""From tensors to a manifest: what may travel, and a reason by name for everything that may not."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter, eq, gt
from types import MappingProxyType

import torch

from netloader.codecs.npu_formats import PLAIN, format_of
from netloader.core.manifest import ITEM_BYTES, MAX_DIMS, MAX_NAME, MAX_TENSORS, Manifest, TensorSpec, is_dense
from netloader.errors import ManifestError
from netloader.tensors.mappings import not_writable
from netloader.tensors.memory import TOGETHER, Memory

__all__ = ["DTYPES", "describe"]

DTYPES: Mapping[str, torch.dtype] = MappingProxyType({n: getattr(torch, n) for n in ITEM_BYTES if hasattr(torch, n)})
"""The dtypes of :data:`~netloader.core.manifest.ITEM_BYTES` that this torch has."""

_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})


def describe(
    tensors: Mapping[str, torch.Tensor], *, weak: bool = False, writable: bool = False
) -> tuple[Manifest, Memory]:
    """Describe a set of tensors, in the order given.

    Tensors that are the very same memory (tied weights) are described once and named as aliases after that. Bytes are
    counted in address order, so that a transposed weight travels as it lies.

    Args:
        tensors: By full name; all on one device, each dense in some order of its dimensions.
        weak: Hold the tensors weakly: the memory may be dropped by its owner at any time.
        writable: Refuse tensors that this process may not write to (over a read-only mapping of a file, say).

    Returns:
        The manifest, and the memory that it describes.

    Raises:
        ManifestError: Some tensors can't travel; each is named with its reason.
    """
    # Not through the hooks of tensor classes: they cost several times more, and this is about memory only.
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - has no other name
        survey, refused = _surveyed(tensors)
        problems = [f"{_shown(name)}: {refused[name]}" for name in tensors if name in refused]
        problems += survey.problems(writable=writable)
        specs = [] if problems else survey.specs()
    if len(tensors) > MAX_TENSORS:
        problems.append(f"{len(tensors)} tensors are too many: at most {MAX_TENSORS} are possible")
    if problems:
        count = f"{len(problems)} tensor{'s' if len(problems) > 1 else ''} of {len(tensors)}"
        raise ManifestError(
            f"{count} cannot {'be filled' if writable else 'travel'}",
            problems=problems,
            hint="leave them out, or use plain dense copies of them",
        )
    manifest = Manifest.of(specs, survey.wire_bytes())
    return manifest, Memory(
        manifest,
        list(tensors.values()),
        survey.device,
        addresses=survey.addresses,
        weak=weak,
        keep=not (weak or writable),
    )


def _surveyed(tensors: Mapping[str, torch.Tensor]) -> tuple[_Survey, dict[str, str]]:
    """A survey of those that could each travel alone, and by name why the others can't."""
    survey, refused = None, dict[str, str]()
    if _all_usual(tensors):
        try:
            survey = _Survey(tensors)
        except RuntimeError:  # some tensor has no memory that can be named by an address
            survey = None
    if survey is None:
        refused = {name: why for name, tensor in tensors.items() if (why := _why_unreadable(name, tensor))}
        survey = _Survey(_without(tensors, refused))
    odd = survey.odd()
    if odd:
        refused |= odd
        survey = _Survey(_without(tensors, refused))
    return survey, refused


def _without(tensors: Mapping[str, torch.Tensor], names: Container[str]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@dataclass(frozen=True, slots=True)
class _Kind:
    """What tensors of one dtype and shape have in common: worked out once, since a model has few of them."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    complex: bool
    problem: str


class _Kinds(dict[tuple[torch.dtype, torch.Size], _Kind]):
    """Kinds by dtype and shape."""

    def __missing__(self, key: tuple[torch.dtype, torch.Size]) -> _Kind:
        dtype, size = key
        shape, name = tuple(size), _NAMES.get(dtype)
        if name is None:
            kind = _Kind("", shape, 0, False, f"its dtype {dtype} cannot travel")
        else:
            many = f"it has {len(shape)} dimensions, at most {MAX_DIMS} are possible" if len(shape) > MAX_DIMS else ""
            kind = _Kind(name, shape, math.prod(shape) * ITEM_BYTES[name], dtype.is_complex, many)
        self[key] = kind
        return kind


class _Survey:
    """What is found out about a set of tensors, in a list for each property.

    Tens of thousands of them are not rare, and a client describes its own before it asks for the first block: each
    property is asked of each tensor once, no loop of ours goes through them where one of the interpreter's can, and all
    is asked of some of them before any of the others: what they are made of is then still in the processor's memory.

    Args:
        tensors: By name; of each :func:`_why_unreadable` finds nothing.

    Attributes:
        device: Where they are, or most of them.
        addresses: Where the memory of each begins.

    Raises:
        RuntimeError: Some tensor has no memory that can be named by an address.
    """

    def __init__(self, named: Mapping[str, torch.Tensor]) -> None:
        self._names = list(named)
        self._tensors = tensors = list(named.values())
        self.addresses: list[int] = []
        self._known = _Kinds()
        self._kinds: list[_Kind] = []
        self._devices: list[torch.device] = []
        self._permuted: list[int] = []
        self._negative = False
        cpu = torch.device("cpu")
        for first in range(0, len(tensors), TOGETHER):
            part = tensors[first : first + TOGETHER]
            self.addresses += map(torch.Tensor.data_ptr, part)  # first: what has no plain memory fails here
            dtypes, shapes = map(attrgetter("dtype"), part), map(attrgetter("shape"), part)
            self._kinds += map(self._known.__getitem__, zip(dtypes, shapes, strict=True))
            # Not where each one is, unless it matters: an object for each answer, and comparing them, takes longer.
            here = all(map(attrgetter("is_cpu"), part))
            self._devices += [cpu] * len(part) if here else map(attrgetter("device"), part)
            row_major = list(map(torch.Tensor.is_contiguous, part))
            if False in row_major:
                self._permuted += [place for place, plain in enumerate(row_major, first) if not plain]
            self._negative = self._negative or any(map(torch.Tensor.is_neg, part))
        self.device = self._devices[0] if tensors else cpu
        if self._devices.count(self.device) < len(tensors):
            self.device = Counter(self._devices).most_common(1)[0][0]
        self._aliases: dict[int, int] = {}
        # Of those with bytes of their own, in the order of their memory: place, start and end.
        self._order: list[int] = []
        self._starts: list[int] = []
        self._ends: list[int] = []

    def odd(self) -> dict[str, str]:
        """By name, why tensors can't travel that can be looked at: the first reason of each."""
        tensors, kinds, known = self._tensors, self._kinds, self._known.values()
        found: dict[int, str] = {}
        if 0 in self.addresses:
            for place, (address, kind) in enumerate(zip(self.addresses, kinds, strict=True)):
                if kind.nbytes and not address:
                    meta = tensors[place].is_meta
                    found[place] = "it is on the meta device and has no memory" if meta else "it has no memory"
        for place in self._permuted:
            shape, stride = kinds[place].shape, tensors[place].stride()
            if not is_dense(shape, stride):
                found[place] = f"stride {tuple(stride)} leaves gaps or visits memory twice for shape {shape}"
        if self._negative or any(kind.complex for kind in known):
            for place, (tensor, kind) in enumerate(zip(tensors, kinds, strict=True)):
                if tensor.is_neg() or (kind.complex and tensor.is_conj()):
                    found[place] = "it is a lazy conjugate or negative: its memory holds other values"
        if any(kind.problem for kind in known):
            found |= {place: kind.problem for place, kind in enumerate(kinds) if kind.problem}
        return {self._names[place]: why for place, why in found.items()}

    def specs(self) -> list[TensorSpec]:
        """What they look like, once :meth:`problems` has found none."""
        kinds = self._kinds
        dtypes, shapes = map(attrgetter("dtype"), kinds), map(attrgetter("shape"), kinds)
        specs = list(map(TensorSpec, self._names, dtypes, shapes))
        strides, formats = self._strides, self._formats
        for place in sorted({*strides, *formats, *self._aliases}):
            owner = self._aliases.get(place)
            specs[place] = TensorSpec(
                self._names[place],
                kinds[place].dtype,
                kinds[place].shape,
                strides.get(place, ()),
                formats.get(place, PLAIN),
                "" if owner is None else self._names[owner],
            )
        return specs

    def wire_bytes(self) -> list[int]:
        """Bytes of each that travel, once :meth:`problems` has found none."""
        sizes = [kind.nbytes for kind in self._kinds]
        for place in self._aliases:
            sizes[place] = 0
        return sizes

    def problems(self, *, writable: bool) -> list[str]:
        """What keeps tensors from travelling that each could travel alone."""
        if self._devices.count(self.device) < len(self._tensors):
            return self._strangers()
        found = [
            f"{self._names[place]}: it is a part of memory in format {memory_format}, which has no parts"
            for place, memory_format in self._formats.items()
            if self._tensors[place].storage_offset() != 0
        ]
        self._lay_out()
        found += self._overlaps()
        if writable and self.device == torch.device("cpu"):
            found += self._locked(not_writable(self._starts, self._ends))
        return found

    @cached_property
    def _strides(self) -> dict[int, tuple[int, ...]]:
        """Strides of those that do not lie in row-major order, by place."""
        return {place: _canonical(self._tensors[place].stride(), self._kinds[place].shape) for place in self._permuted}

    @cached_property
    def _formats(self) -> dict[int, str]:
        """Memory formats of those that are not in the plain one, by place."""
        if self.device.type != "npu":
            return {}
        formats = map(format_of, self._tensors)
        return {place: memory_format for place, memory_format in enumerate(formats) if memory_format != PLAIN}

    def _lay_out(self) -> None:
        """Bring those with bytes of their own into the order of their memory."""
        addresses, sizes = self.addresses, [kind.nbytes for kind in self._kinds]
        order = sorted(range(len(addresses)), key=addresses.__getitem__)
        if 0 in sizes:
            order = [place for place in order if sizes[place]]
        starts = [addresses[place] for place in order]
        if any(map(eq, starts, starts[1:])):
            self._find_aliases()
            spans = sorted((addresses[p], addresses[p] + sizes[p], p) for p in order if p not in self._aliases)
            order, starts = [place for _, _, place in spans], [start for start, _, _ in spans]
        self._order, self._starts = order, starts
        self._ends = [start + sizes[place] for start, place in zip(starts, order, strict=True)]

    def _find_aliases(self) -> None:
        """Find those that are the very same memory, and nothing else, as an earlier one."""
        strides, formats = self._strides, self._formats

        def layout(place: int) -> tuple[object, ...]:
            kind = self._kinds[place]
            return kind.dtype, kind.shape, strides.get(place), formats.get(place)

        owners: dict[int, int] = {}
        for place, (address, kind) in enumerate(zip(self.addresses, self._kinds, strict=True)):
            if kind.nbytes:
                owner = owners.setdefault(address, place)
                if owner != place and layout(owner) == layout(place):
                    self._aliases[place] = owner

    def _overlaps(self) -> list[str]:
        """Name tensors that share memory without being the same tensor."""
        if not any(map(gt, self._ends, self._starts[1:])):
            return []
        found = []
        past, holder = 0, 0
        for start, end, place in zip(self._starts, self._ends, self._order, strict=True):
            if start < past:
                found.append(
                    f"{self._names[place]}: its memory overlaps that of {self._names[holder]} "
                    "without being the same tensor"
                )
            if end > past:
                past, holder = end, place
        return found

    def _locked(self, locked: Iterable[tuple[int, int]]) -> list[str]:
        """Name tensors that reach into these address ranges.

        torch does not know that such memory is read-only: the first write would end the process.
        """
        found = []
        for start, end in locked:
            # Tensors don't overlap, so those that begin before the range ends are in the order of their ends, too.
            at = bisect_left(self._starts, end) - 1
            while at >= 0 and self._ends[at] > start:
                found.append(f"{self._names[self._order[at]]}: its memory is read-only")
                at -= 1
        return found

    def _strangers(self) -> list[str]:
        """Name tensors that are not on the device where most are."""
        most = self._devices.count(self.device)
        return [
            f"{name}: it is on {device}, {most} others are on {self.device}"
            for name, device in zip(self._names, self._devices, strict=True)
            if device != self.device
        ]


def _canonical(stride: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """`stride` as both sides have to write it: for dimensions of size 1 torch keeps whatever it was."""
    return tuple(step if size != 1 else 1 for step, size in zip(stride, shape, strict=True))


def _shown(name: object) -> str:
    return str(name)[:80].encode(errors="backslashreplace").decode() or "''"


def _all_usual(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether none needs a closer look before it is asked anything, as far as names and types tell."""
    if not tensors:
        return True
    return (
        set(map(type, tensors)) == {str}
        and "" not in tensors
        and max(map(len, tensors)) <= MAX_NAME
        and "".join(tensors).isascii()
        and not any(map(_type_problem, set(map(type, tensors.values()))))
    )


def _name_problem(name: object) -> str:
    if not isinstance(name, str):
        return "a name has to be text"
    if not 1 <= len(name) <= MAX_NAME:
        return f"a name has 1 to {MAX_NAME} characters, this one {len(name)}"
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            return "the name is no valid text"
    return ""


def _type_problem(kind: type) -> str:
    if not issubclass(kind, torch.Tensor):
        return f"it is no tensor but {kind.__name__}"
    if issubclass(kind, torch.nn.UninitializedParameter | torch.nn.UninitializedBuffer):
        return "it has no memory yet (uninitialised)"
    # A class that takes over every operation (DTensor, torchao, FakeTensor) keeps its data in tensors of its own.
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"its class {kind.__name__} keeps its data elsewhere"
    return ""


def _why_unreadable(name: object, tensor: torch.Tensor) -> str:
    """Why a tensor cannot be named, or its memory not be addressed; empty when both can."""
    problem = _name_problem(name) or _type_problem(type(tensor))
    if problem:
        return problem
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}, only strided memory can travel"
    try:
        tensor.data_ptr()
    except RuntimeError as error:  # a wrapper without a class of its own (torch.func)
        return f"its memory cannot be addressed: {error}"
    return ""
