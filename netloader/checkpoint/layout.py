"""How tensors are laid out in safetensors files: which file they are in, the header, the index. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import msgspec

from netloader.checkpoint.files import WEIGHT_SUFFIX
from netloader.checkpoint.metadata import with_aliases
from netloader.core.manifest import ITEM_BYTES
from netloader.errors import CheckpointError

__all__ = [
    "FORMAT_NAMES",
    "SHARD_BYTES",
    "Stored",
    "check_storable",
    "header_of",
    "index_of",
    "own_metadata",
    "shard_names",
    "shards_of",
]

SHARD_BYTES = 5_000_000_000
"""Most bytes in one file, unless a single tensor is larger. Other tools use the same size."""

FORMAT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "bool": "BOOL",
        "uint8": "U8",
        "int8": "I8",
        "uint16": "U16",
        "int16": "I16",
        "uint32": "U32",
        "int32": "I32",
        "uint64": "U64",
        "int64": "I64",
        "float16": "F16",
        "bfloat16": "BF16",
        "float32": "F32",
        "float64": "F64",
        "complex64": "C64",
        "float8_e4m3fn": "F8_E4M3",
        "float8_e4m3fnuz": "F8_E4M3FNUZ",
        "float8_e5m2": "F8_E5M2",
        "float8_e5m2fnuz": "F8_E5M2FNUZ",
        "float8_e8m0fnu": "F8_E8M0",
        "float4_e2m1fn_x2": "F4",
    }
)
"""The file format's name of each dtype that it supports."""

_MAX_HEADER = 100_000_000
"""Most bytes of a header; readers refuse longer ones."""

_PAIRS = "float4_e2m1fn_x2"


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file.

    Attributes:
        name: Its name.
        dtype: Key of :data:`FORMAT_NAMES`.
        shape: Sizes, in elements.
        nbytes: Bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


S = TypeVar("S", bound=Stored)


def check_storable(entries: Iterable[tuple[str, str, Sequence[int]]]) -> None:
    """Check that files can hold these tensors: name, dtype, shape.

    Raises:
        CheckpointError: They can't; some of them are named.
    """
    unfit = [
        f"{name} ({'a scalar of ' * (dtype == _PAIRS)}torch.{dtype})"
        for name, dtype, shape in entries
        if dtype not in FORMAT_NAMES or (dtype == _PAIRS and not shape) or name == "__metadata__"
    ]
    if unfit:
        raise CheckpointError(f"safetensors files can't hold {', '.join(unfit[:5])}")


def shards_of(entries: Sequence[S], shard_bytes: int) -> list[list[S]]:
    """Divide tensors among files, in order."""
    shards: list[list[S]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    # Wide elements first, so that each tensor starts at a multiple of its element size. The sort is stable.
    return [sorted(shard, key=lambda entry: -ITEM_BYTES[entry.dtype]) for shard in shards]


def shard_names(count: int) -> list[str]:
    """Names of that many files of one checkpoint."""
    if count == 1:
        return [f"model{WEIGHT_SUFFIX}"]
    return [f"model-{n:05d}-of-{count:05d}{WEIGHT_SUFFIX}" for n in range(1, count + 1)]


def own_metadata(metadata: Mapping[str, str], aliases: Mapping[str, str], shard: Sequence[Stored]) -> dict[str, str]:
    """The metadata of one file: the common texts, and the aliases of its own tensors."""
    names = {entry.name for entry in shard}
    return with_aliases(metadata, {alias: owner for alias, owner in aliases.items() if owner in names})


def index_of(names: Sequence[str], shards: Sequence[Sequence[Stored]]) -> bytes:
    """The contents of the index of several files."""
    weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    total = sum(entry.nbytes for shard in shards for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return msgspec.json.format(msgspec.json.encode(index), indent=2) + b"\n"


def header_of(name: str, entries: Sequence[Stored], metadata: Mapping[str, str]) -> bytes:
    """The beginning of the file `name`, up to the first tensor: its length is a multiple of 8.

    Raises:
        CheckpointError: It would be too long.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        # The format counts elements of 4 bits one by one, torch in pairs.
        shape = [*entry.shape[:-1], entry.shape[-1] * 2] if entry.dtype == _PAIRS else list(entry.shape)
        header[entry.name] = {
            "dtype": FORMAT_NAMES[entry.dtype],
            "shape": shape,
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    encoded = msgspec.json.encode(header)
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > _MAX_HEADER:
        raise CheckpointError(f"{name} would have a header of {len(encoded)} bytes", hint="use smaller shards")
    return len(encoded).to_bytes(8, "little") + encoded
