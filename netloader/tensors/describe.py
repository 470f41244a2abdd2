"""From tensors to a manifest: what may travel, and a reason by name for everything that may not."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from netloader.codecs.npu_formats import PLAIN, format_of
from netloader.errors import ManifestError
from netloader.manifest import ITEM_BYTES, MAX_DIMS, MAX_NAME, MAX_TENSORS, Manifest, TensorSpec, is_dense
from netloader.tensors.mappings import NOT_WRITABLE, mapped
from netloader.tensors.memory import Memory

__all__ = ["DTYPES", "describe"]

DTYPES: Mapping[str, torch.dtype] = MappingProxyType({n: getattr(torch, n) for n in ITEM_BYTES if hasattr(torch, n)})
"""The dtypes of :data:`~netloader.manifest.ITEM_BYTES` that this torch has."""

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
    survey = _Survey()
    # Not through the hooks of tensor classes: they cost several times more, and this is about memory only.
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - has no other name
        for name, tensor in tensors.items():
            survey.add(name, tensor)
        if survey.mixed:
            survey.find_strangers()
    if not survey.mixed:
        survey.sort()
        survey.find_overlaps()
        if writable and survey.device == torch.device("cpu"):
            survey.find_locked(mapped(NOT_WRITABLE))
    if len(survey.specs) > MAX_TENSORS:
        survey.problems.append(f"{len(survey.specs)} tensors are too many: at most {MAX_TENSORS} are possible")
    if survey.problems:
        count = f"{len(survey.problems)} tensor{'s' if len(survey.problems) > 1 else ''} of {len(tensors)}"
        raise ManifestError(
            f"{count} cannot {'be filled' if writable else 'travel'}",
            problems=survey.problems,
            hint="leave them out, or use plain dense copies of them",
        )
    manifest = Manifest(tuple(survey.specs))
    device = survey.device or torch.device("cpu")
    return manifest, Memory(manifest, survey.tensors, device, addresses=survey.addresses, weak=weak)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What tensors of one dtype and shape have in common: worked out once, since a model has few of them."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    complex: bool
    problem: str


class _Survey:
    """What is found out about a set of tensors, one after the other.

    Tens of thousands of them are not rare, and a client describes its own before it asks for the first block: each
    property is asked of a tensor once.
    """

    def __init__(self) -> None:
        self.specs: list[TensorSpec] = []
        self.tensors: list[torch.Tensor] = []
        self.addresses: list[int] = []
        self.problems: list[str] = []
        self.device: torch.device | None = None
        self.mixed = False
        self._private = False  # some device has memory formats of its own
        self._spans: list[tuple[int, int, int]] = []  # address, end, index
        self._owners: dict[int, int] = {}  # address -> index of the first tensor there
        self._types: dict[type, str] = {torch.Tensor: "", torch.nn.Parameter: ""}
        self._kinds: dict[torch.dtype, dict[tuple[int, ...], _Kind]] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Describe one tensor, or note why not."""
        problem = self._types.get(type(tensor))
        if problem is None:
            problem = self._types[type(tensor)] = _type_problem(type(tensor))
        problem = _name_problem(name) or problem
        if not problem and tensor.layout is not torch.strided:
            problem = f"its layout is {tensor.layout}, only strided memory can travel"
        if problem:
            self._cannot(name, problem)
            return
        dtype, size = tensor.dtype, tensor.shape
        try:
            kind = self._kinds[dtype][size]
        except KeyError:
            kind = self._new_kind(dtype, size)
        row_major = tensor.is_contiguous()
        address, problem = _address_of(tensor, kind, row_major=row_major)
        if problem:
            self._cannot(name, problem)
            return
        device = tensor.device
        if device != self.device:
            self.mixed |= self.device is not None
            self.device = self.device or device
            self._private |= device.type == "npu"
        stride = () if row_major else _canonical(tensor.stride(), kind.shape)
        memory_format = format_of(tensor) if self._private else PLAIN
        if memory_format != PLAIN and tensor.storage_offset() != 0:
            self.problems.append(f"{name}: it is a part of memory in format {memory_format}, which has no parts")
            return
        index, alias_of = len(self.specs), ""
        if kind.nbytes:
            first = self._owners.setdefault(address, index)
            if first != index and _alike(self.specs[first], kind, stride, memory_format):
                alias_of = self.specs[first].name
            else:
                self._spans.append((address, address + kind.nbytes, index))
        self.specs.append(TensorSpec(name, kind.dtype, kind.shape, stride, memory_format, alias_of))
        self.tensors.append(tensor)
        self.addresses.append(address)

    def sort(self) -> None:
        """All were added: what follows goes through them in the order of their memory."""
        self._spans.sort()

    def find_overlaps(self) -> None:
        """Note tensors that share memory without being the same tensor."""
        past, holder = 0, 0
        for address, end, index in self._spans:
            if address < past:
                self.problems.append(
                    f"{self.specs[index].name}: its memory overlaps that of {self.specs[holder].name} "
                    "without being the same tensor"
                )
            if end > past:
                past, holder = end, index

    def find_locked(self, locked: Iterable[tuple[int, int]]) -> None:
        """Note tensors that reach into these address ranges.

        torch does not know that such memory is read-only: the first write would end the process.
        """
        spans = self._spans
        for start, end in locked:
            # Tensors don't overlap, so those that begin before the range ends are in the order of their ends, too.
            at = bisect_left(spans, (end, 0, 0)) - 1
            while at >= 0 and spans[at][1] > start:
                self.problems.append(f"{self.specs[spans[at][2]].name}: its memory is read-only")
                at -= 1

    def find_strangers(self) -> None:
        """Note tensors that are not on the device where most are."""
        home, most = Counter(tensor.device for tensor in self.tensors).most_common(1)[0]
        self.problems += [
            f"{spec.name}: it is on {tensor.device}, {most} others are on {home}"
            for spec, tensor in zip(self.specs, self.tensors, strict=True)
            if tensor.device != home
        ]

    def _cannot(self, name: object, problem: str) -> None:
        shown = str(name)[:80].encode(errors="backslashreplace").decode() or "''"
        self.problems.append(f"{shown}: {problem}")

    def _new_kind(self, dtype: torch.dtype, size: torch.Size) -> _Kind:
        shape, name = tuple(size), _NAMES.get(dtype)
        if name is None:
            kind = _Kind("", shape, 0, False, f"its dtype {dtype} cannot travel")
        else:
            many = f"it has {len(shape)} dimensions, at most {MAX_DIMS} are possible" if len(shape) > MAX_DIMS else ""
            kind = _Kind(name, shape, math.prod(shape) * ITEM_BYTES[name], dtype.is_complex, many)
        self._kinds.setdefault(dtype, {})[shape] = kind
        return kind


def _alike(owner: TensorSpec, kind: _Kind, stride: tuple[int, ...], memory_format: str) -> bool:
    """Whether a tensor at the same address is the very same tensor."""
    theirs = (owner.dtype, owner.shape, owner.stride, owner.format)
    return theirs == (kind.dtype, kind.shape, stride, memory_format)


def _canonical(stride: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """`stride` as both sides have to write it: for dimensions of size 1 torch keeps whatever it was."""
    return tuple(step if size != 1 else 1 for step, size in zip(stride, shape, strict=True))


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


def _address_of(tensor: torch.Tensor, kind: _Kind, *, row_major: bool) -> tuple[int, str]:
    """Where the bytes of a strided tensor begin; or why they can't be named by address."""
    if kind.problem:
        return 0, kind.problem
    if tensor.is_neg() or (kind.complex and tensor.is_conj()):
        return 0, "it is a lazy conjugate or negative: its memory holds other values"
    if not row_major and not is_dense(kind.shape, tensor.stride()):
        return 0, f"stride {tuple(tensor.stride())} leaves gaps or visits memory twice for shape {kind.shape}"
    try:
        address = tensor.data_ptr()
    except RuntimeError as error:  # a wrapper without a class of its own (torch.func)
        return 0, f"its memory cannot be addressed: {error}"
    if not address and kind.nbytes:
        return 0, "it is on the meta device and has no memory" if tensor.is_meta else "it has no memory"
    return address, ""
