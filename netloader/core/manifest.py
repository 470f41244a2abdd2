"""The manifest, which is the ordered list of tensors that a server holds, and the root, which identifies their bytes.

A root is a digest over the manifest and the digests of all blocks.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from functools import cached_property
from operator import ne
from typing import Annotated

import msgspec

from netloader.errors import ManifestError, plural, shown

__all__ = [
    "DIGEST_BYTES",
    "ITEM_BYTES",
    "MAX_DIMS",
    "MAX_ELEMENTS",
    "MAX_MANIFEST_BYTES",
    "MAX_NAME",
    "MAX_SIZES",
    "MAX_TENSORS",
    "TENSORS_AT_ONCE",
    "Manifest",
    "Mismatch",
    "TensorSpec",
    "announced_bytes",
    "array_header",
    "check_sizes",
    "compare",
    "compute_root",
    "manifest_digest",
]

MAX_NAME = 1024
"""Characters in a tensor's name."""

MAX_DIMS = 64
"""Dimensions of a tensor; torch's own limit."""

MAX_TENSORS = 1 << 19
"""Tensors in one manifest. A peer's manifest is decoded before it can be checked, so its length has a limit. A
quantised model of 384 experts in 60 layers has about 210,000."""

MAX_MANIFEST_BYTES = 96 * MAX_TENSORS
"""Bytes of all tensors of one manifest, as they are sent. A tensor with a name of 60 characters takes about 85."""

MAX_SIZES = 4 * MAX_TENSORS
"""Sizes and strides of all tensors of one manifest together. Published models have two or three for each tensor."""

MAX_ELEMENTS = 1 << 62
"""Most elements of one tensor, not counting dimensions of size 0: their bytes still fit into 64 bits."""

TENSORS_AT_ONCE = 4096
"""Most tensors that one call into C handles, because it blocks all other threads, including the event loop's."""

DIGEST_BYTES = 16
"""Bytes of one block digest (128 bits)."""

ITEM_BYTES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
}
"""Bytes per element of every supported dtype, by torch's name without the ``torch.``."""

_Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_ELEMENTS)]
_Sizes = Annotated[tuple[_Size, ...], msgspec.Meta(max_length=MAX_DIMS)]
_Word = Annotated[str, msgspec.Meta(max_length=64)]


# gc=False: an instance can't be part of a reference cycle, so the collector need not visit tens of thousands of them.
class TensorSpec(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One tensor of a manifest. New fields are added at the end only, because their order is the wire format.

    Attributes:
        name: Full name, unique within the manifest.
        dtype: Key of :data:`ITEM_BYTES`.
        shape: Sizes, in elements.
        stride: Strides, in elements, when the memory is dense but not in row-major order (a transposed weight); empty
            for row-major order. The bytes are sent in the order of their addresses.
        format: Memory format on the device; ``nd`` for the plain one.
        alias_of: Name of an earlier tensor in the same memory (tied weights). An alias has no bytes of its own.
    """

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
    dtype: _Word
    shape: _Sizes
    stride: _Sizes = ()
    format: _Word = "nd"
    alias_of: Annotated[str, msgspec.Meta(max_length=MAX_NAME)] = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements, for an alias too."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def wire_bytes(self) -> int:
        """Bytes that are sent for this tensor: 0 for an alias."""
        return 0 if self.alias_of else self.nbytes


_MOST_PROBLEMS = 100
"""Unusable tensors after which a manifest is not examined further."""

_DETAILED = 100
"""Mismatches that are explained; a peer could make any number of them."""


class _BytesOf(dict[tuple[int, ...], int]):
    """Cache of tensor sizes in bytes by shape, for one dtype: a model has few distinct shapes."""

    def __init__(self, item_bytes: int) -> None:
        super().__init__()
        self._item_bytes = item_bytes

    def __missing__(self, shape: tuple[int, ...]) -> int:
        nbytes = self[shape] = math.prod(shape) * self._item_bytes
        return nbytes


class Manifest(msgspec.Struct, frozen=True, array_like=True, dict=True):
    """The ordered list of tensors of one holding.

    Attributes:
        tensors: The tensors, in the order in which blocks are cut from them.
    """

    tensors: Annotated[tuple[TensorSpec, ...], msgspec.Meta(max_length=MAX_TENSORS)]

    @classmethod
    def of(cls, tensors: Sequence[TensorSpec], sizes: Sequence[int]) -> Manifest:
        """A manifest whose :attr:`sizes` are known already."""
        manifest = cls(tuple(tensors))
        vars(manifest)["sizes"] = tuple(sizes)
        return manifest

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """:attr:`TensorSpec.wire_bytes` of each tensor."""
        tables = {dtype: _BytesOf(nbytes) for dtype, nbytes in ITEM_BYTES.items()}
        return tuple([0 if t.alias_of else tables[t.dtype][t.shape] for t in self.tensors])

    @cached_property
    def nbytes(self) -> int:
        """Bytes that are sent in a whole pull."""
        return sum(self.sizes)

    def check(self) -> None:
        """Check a peer's manifest for everything that the plan relies on.

        Raises:
            ManifestError: There are too many tensors or dimensions, a name is empty or not unique, a dtype is unknown,
                a shape is impossible, a stride is not dense, or an alias names no earlier tensor of the same dtype,
                shape, stride and format.
        """
        if len(self.tensors) > MAX_TENSORS:
            raise ManifestError(f"the manifest has {len(self.tensors)} tensors, at most {MAX_TENSORS} are allowed")
        check_sizes(self.tensors)
        problems: list[str] = []
        seen: dict[str, TensorSpec] = {}
        for spec in self.tensors:
            problem = _problem(spec, seen)
            if problem:
                problems.append(f"{shown(spec.name, 80)}: {problem}")
                if len(problems) == _MOST_PROBLEMS:
                    break
            seen[spec.name] = spec
        if problems:
            least = "at least " if len(problems) == _MOST_PROBLEMS else ""
            raise ManifestError(
                f"the manifest has {least}{plural(len(problems), 'unusable tensor')}",
                problems=problems,
                hint="such tensors cannot be sent: leave them out, or pull from another source",
            )


def check_sizes(tensors: Sequence[TensorSpec], before: int = 0) -> int:
    """Count sizes and strides, which a peer's manifest may have a limited number of.

    Args:
        tensors: Some tensors of the manifest.
        before: How many the tensors before these have.

    Returns:
        How many there are, those before included.

    Raises:
        ManifestError: There are more than :data:`MAX_SIZES`.
    """
    sizes = before + sum([len(spec.shape) + len(spec.stride) for spec in tensors])
    if sizes > MAX_SIZES:
        raise ManifestError(f"the tensors of the manifest have more than {MAX_SIZES} sizes and strides together")
    return sizes


def _problem(spec: TensorSpec, seen: dict[str, TensorSpec]) -> str:
    if not 1 <= len(spec.name) <= MAX_NAME:
        return f"a name has 1 to {MAX_NAME} characters, this one {len(spec.name)}"
    if not (_encodable(spec.name) and _encodable(spec.format)):
        return "name or format cannot be written in UTF-8"
    if spec.name in seen:
        return "the name is not unique"
    if spec.dtype not in ITEM_BYTES:
        return f"unknown dtype {shown(spec.dtype, 80)}"
    if not _possible(spec.shape):
        return f"impossible shape {shown(spec.shape)}"
    if spec.stride and not is_dense(spec.shape, spec.stride):
        return f"stride {shown(spec.stride)} does not cover shape {shown(spec.shape)} without gaps"
    if spec.alias_of:
        owner = seen.get(spec.alias_of)
        if owner is None or owner.alias_of:
            return f"alias of {shown(spec.alias_of)}, which is no earlier tensor with memory of its own"
        if (owner.dtype, owner.shape, owner.stride, owner.format) != (
            spec.dtype,
            spec.shape,
            spec.stride,
            spec.format,
        ):
            return f"alias of {shown(spec.alias_of)}, which has another dtype, shape, stride or format"
    return ""


def _encodable(text: str) -> bool:
    """Whether `text` can be encoded in UTF-8. A lone surrogate, from an undecodable file name, can't."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _possible(shape: Sequence[int]) -> bool:
    """Whether `shape` is a possible tensor shape: few dimensions, none negative, and a product within the limit."""
    if len(shape) > MAX_DIMS:
        return False
    elements = 1
    for size in shape:
        if not 0 <= size <= MAX_ELEMENTS:
            return False
        # A dimension of size 0 does not make huge ones acceptable, because strides are computed from all of them.
        elements *= size or 1
        if elements > MAX_ELEMENTS:
            return False
    return True


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether `shape` with `stride` covers one contiguous span exactly once, with its dimensions in any order."""
    if len(shape) != len(stride) or not all(0 <= step <= MAX_ELEMENTS for step in stride):
        return False
    if math.prod(shape) == 0:
        return True
    expected = 1
    for step, size in sorted((st, sz) for sz, st in zip(shape, stride, strict=True) if sz != 1):
        if step != expected:
            return False
        expected *= size
    return True


class Mismatch(msgspec.Struct, frozen=True):
    """One tensor in which two manifests differ.

    Attributes:
        name: The tensor.
        reason: What differs, with both values.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def compare(ours: Manifest, theirs: Manifest) -> tuple[Mismatch, ...]:
    """Find every tensor in which two manifests differ. Their order counts, because blocks are cut in this order.

    Args:
        ours: Manifest of the tensors that this side is about to fill.
        theirs: The manifest that the server announced.

    Returns:
        All mismatches; empty when the manifests are equal. First the tensors that both sides have and that differ,
        because they show best what was set up differently, then those that are missing here or there. When only the
        order differs, the first place where it does.
    """
    if len(ours.tensors) == len(theirs.tensors) and all(
        ours.tensors[at : at + TENSORS_AT_ONCE] == theirs.tensors[at : at + TENSORS_AT_ONCE]
        for at in range(0, len(ours.tensors), TENSORS_AT_ONCE)
    ):
        return ()
    mine = {t.name: t for t in ours.tensors}
    other = {t.name: t for t in theirs.tensors}
    found: list[Mismatch] = []
    for name, spec in mine.items():
        if name in other and spec != other[name]:
            found.append(Mismatch(name, _difference(spec, other[name]) if len(found) < _DETAILED else "it differs too"))
    found += [Mismatch(name, "the server does not hold it") for name in mine if name not in other]
    found += [Mismatch(name, "it is not expected here") for name in other if name not in mine]
    if not found and len(ours.tensors) != len(theirs.tensors):  # only possible when a name is not unique
        found.append(Mismatch("(all)", f"{len(ours.tensors)} tensors here and {len(theirs.tensors)} at the server"))
    if not found:
        at, (a, b) = next((i, ab) for i, ab in enumerate(zip(ours.tensors, theirs.tensors, strict=True)) if ne(*ab))
        found.append(Mismatch(a.name, f"the server has {b.name!r} at position {at}"))
    return tuple(found)


def _difference(ours: TensorSpec, theirs: TensorSpec) -> str:
    """In what two tensors of the same name differ, with both values."""
    found = []
    for field in TensorSpec.__struct_fields__:
        mine, other = getattr(ours, field), getattr(theirs, field)
        if mine == other:
            continue
        if field == "stride":
            found.append(f"in memory it is {_order(mine)} here and {_order(other)} at the server")
        elif field == "alias_of":
            found.append(f"here it {_sharing(mine)}, at the server it {_sharing(other)}")
        else:
            found.append(f"{field} is {shown(mine)} here and {shown(other)} at the server")
    return ", ".join(found)


def _order(stride: tuple[int, ...]) -> str:
    return f"in the order of strides {shown(stride)}" if stride else "in row-major order"


def _sharing(owner: str) -> str:
    return f"shares the memory of {shown(owner)}" if owner else "has memory of its own"


_ENCODER = msgspec.msgpack.Encoder()
_FIXARRAY = 16


def manifest_digest(manifest: Manifest) -> str:
    """Digest of a manifest: blake2b-256 over its wire form, in hex."""
    digest = hashlib.blake2b(digest_size=32)
    tensors, no_tensors = manifest.tensors, _ENCODER.encode(Manifest(()))
    digest.update(no_tensors[:-1] + array_header(len(tensors)))
    for at in range(0, len(tensors), TENSORS_AT_ONCE):
        part = tensors[at : at + TENSORS_AT_ONCE]
        digest.update(memoryview(_ENCODER.encode(part))[len(array_header(len(part))) :])
    return digest.hexdigest()


def announced_bytes(manifest: Manifest) -> int:
    """Bytes that the tensors take in an announcement."""
    parts = range(0, len(manifest.tensors), TENSORS_AT_ONCE)
    return sum(len(_ENCODER.encode(manifest.tensors[at : at + TENSORS_AT_ONCE])) for at in parts)


def array_header(length: int) -> bytes:
    """The MessagePack header of an array of this length."""
    if length < _FIXARRAY:
        return bytes((0x90 | length,))
    return struct.pack(">BH", 0xDC, length) if length < 1 << 16 else struct.pack(">BI", 0xDD, length)


def compute_root(
    manifest: Manifest, block_bytes: int, algorithm: str, digests: bytes, *, known_digest: str = ""
) -> str:
    """The root: one digest that identifies the exact weights.

    Args:
        manifest: The tensors.
        block_bytes: The block size, which decides which bytes each digest covers.
        algorithm: Name of the block digest.
        digests: All block digests joined, :data:`DIGEST_BYTES` each, in the order of the blocks.
        known_digest: :func:`manifest_digest` of `manifest`, if it was computed already.

    Returns:
        64 hex digits (blake2b-256).
    """
    digest = hashlib.blake2b(digest_size=32, person=b"netloader-root")
    digest.update((known_digest or manifest_digest(manifest)).encode())
    digest.update(f"/{block_bytes}/{algorithm}/".encode())
    digest.update(digests)
    return digest.hexdigest()
