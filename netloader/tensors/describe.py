"""Makes a manifest from tensors. Names each tensor that cannot be sent, with the reason."""

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
from netloader.tensors.memory import BATCH_TENSORS, TensorMemory

__all__ = ["DTYPES", "describe"]

DTYPES: Mapping[str, torch.dtype] = MappingProxyType({n: getattr(torch, n) for n in ITEM_BYTES if hasattr(torch, n)})
"""The dtypes of :data:`~netloader.core.manifest.ITEM_BYTES` that this torch has."""

_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})


def describe(
    tensors: Mapping[str, torch.Tensor], *, weak: bool = False, writable: bool = False
) -> tuple[Manifest, TensorMemory]:
    """Describe a set of tensors, in the order given.

    Tensors that share exactly the same memory (tied weights) are described once; the later ones are aliases. Bytes are
    sent in the order of their addresses, so a transposed weight needs no copy.

    Args:
        tensors: By full name; all on one device, each dense in some order of its dimensions.
        weak: Hold only weak references: the owner may free the memory at any time.
        writable: Refuse tensors that this process cannot write to, such as those in a read-only mapping of a file.

    Returns:
        The manifest, and the memory that it describes.

    Raises:
        ManifestError: Some tensors cannot be sent; each is named with its reason.
    """
    # Bypasses the hooks of tensor subclasses: they are several times slower, and only memory matters here.
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - has no other name
        survey, refused = _survey_of(tensors)
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
    return manifest, TensorMemory(
        manifest,
        list(tensors.values()),
        survey.device,
        addresses=survey.addresses,
        weak=weak,
        keep=not (weak or writable),
    )


def _survey_of(tensors: Mapping[str, torch.Tensor]) -> tuple[_Survey, dict[str, str]]:
    """A survey of the tensors that each could be sent alone, and the reasons for the others by name."""
    survey, refused = None, dict[str, str]()
    if _all_ordinary(tensors):
        try:
            survey = _Survey(tensors)
        except RuntimeError:  # some tensor has no addressable memory
            survey = None
    if survey is None:
        refused = {name: why for name, tensor in tensors.items() if (why := _why_unreadable(name, tensor))}
        survey = _Survey(_without(tensors, refused))
    unsendable = survey.unsendable()
    if unsendable:
        refused |= unsendable
        survey = _Survey(_without(tensors, refused))
    return survey, refused


def _without(tensors: Mapping[str, torch.Tensor], names: Container[str]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@dataclass(frozen=True, slots=True)
class _Kind:
    """Properties of all tensors of one dtype and shape; computed once, because a model has few of these."""

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
    """The properties of a set of tensors, as one list per property.

    Models of tens of thousands of tensors exist, and a client describes its tensors before it requests the first block.
    So each property is read once per tensor, by `map` instead of a Python loop. All properties of one batch are read
    before the next batch, while its objects are in the CPU caches.

    Args:
        named: Tensors by name; :func:`_why_unreadable` is empty for each.

    Attributes:
        device: Device of the tensors, or of most of them.
        addresses: Address of the first byte of each.

    Raises:
        RuntimeError: Some tensor has no addressable memory.
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
        for first in range(0, len(tensors), BATCH_TENSORS):
            part = tensors[first : first + BATCH_TENSORS]
            self.addresses += map(torch.Tensor.data_ptr, part)  # first: raises without addressable memory
            dtypes, shapes = map(attrgetter("dtype"), part), map(attrgetter("shape"), part)
            self._kinds += map(self._known.__getitem__, zip(dtypes, shapes, strict=True))
            # Reads the devices only if some are not the CPU: device objects take longer to make and compare.
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
        # The tensors with bytes of their own, in the order of their addresses: place, start and end.
        self._order: list[int] = []
        self._starts: list[int] = []
        self._ends: list[int] = []

    def unsendable(self) -> dict[str, str]:
        """The reasons by name for tensors that can be read, but cannot be sent."""
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
        """The specs of all tensors. Call :meth:`problems` before; it must be empty."""
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
        """Bytes to send of each tensor. Call :meth:`problems` before; it must be empty."""
        sizes = [kind.nbytes for kind in self._kinds]
        for place in self._aliases:
            sizes[place] = 0
        return sizes

    def problems(self, *, writable: bool) -> list[str]:
        """The reasons why tensors that could be sent alone cannot be sent together."""
        if self._devices.count(self.device) < len(self._tensors):
            return self._on_other_devices()
        found = [
            f"{self._names[place]}: it is a part of memory in format {memory_format}, which has no parts"
            for place, memory_format in self._formats.items()
            if self._tensors[place].storage_offset() != 0
        ]
        self._lay_out()
        found += self._overlaps()
        if writable and self.device == torch.device("cpu"):
            found += self._read_only(not_writable(self._starts, self._ends))
        return found

    @cached_property
    def _strides(self) -> dict[int, tuple[int, ...]]:
        """Strides of the tensors that are not in row-major order, by place."""
        return {place: _canonical(self._tensors[place].stride(), self._kinds[place].shape) for place in self._permuted}

    @cached_property
    def _formats(self) -> dict[int, str]:
        """Memory formats of the tensors that are not in the plain format, by place."""
        if self.device.type != "npu":
            return {}
        formats = map(format_of, self._tensors)
        return {place: memory_format for place, memory_format in enumerate(formats) if memory_format != PLAIN}

    def _lay_out(self) -> None:
        """Sort the tensors that have bytes of their own by address."""
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
        """Find the tensors that are identical to an earlier one: same address, dtype, shape, strides and format."""
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
        """The problems of tensors that overlap others without being aliases."""
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

    def _read_only(self, locked: Iterable[tuple[int, int]]) -> list[str]:
        """The problems of tensors that overlap these read-only address ranges.

        torch does not check this: the first write to such memory would end the process.
        """
        found = []
        for start, end in locked:
            # The tensors do not overlap, so their ends have the same order as their starts.
            at = bisect_left(self._starts, end) - 1
            while at >= 0 and self._ends[at] > start:
                found.append(f"{self._names[self._order[at]]}: its memory is read-only")
                at -= 1
        return found

    def _on_other_devices(self) -> list[str]:
        """The problems of tensors that are not on the device of most others."""
        most = self._devices.count(self.device)
        return [
            f"{name}: it is on {device}, {most} others are on {self.device}"
            for name, device in zip(self._names, self._devices, strict=True)
            if device != self.device
        ]


def _canonical(stride: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """`stride` in canonical form: for dimensions of size 1, where torch keeps any value, the stride is 1."""
    return tuple(step if size != 1 else 1 for step, size in zip(stride, shape, strict=True))


def _shown(name: object) -> str:
    return str(name)[:80].encode(errors="backslashreplace").decode() or "''"


def _all_ordinary(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether all names and types are ordinary, so that no tensor needs a check of its own."""
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
    # A class that overrides every operation (DTensor, torchao, FakeTensor) keeps its data in other tensors.
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"its class {kind.__name__} keeps its data elsewhere"
    return ""


def _why_unreadable(name: object, tensor: torch.Tensor) -> str:
    """Why the name is not valid or the memory is not addressable; empty when both are fine."""
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
