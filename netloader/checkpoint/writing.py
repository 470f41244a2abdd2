"""Writes a checkpoint: safetensors files, directly from the tensors' memory, renamed into place when complete."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec

from netloader.checkpoint.reading import INDEX_SUFFIX, WEIGHT_SUFFIX
from netloader.core.manifest import ITEM_BYTES
from netloader.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["FORMAT_NAMES", "SHARD_BYTES", "Entry", "write_checkpoint", "write_entries"]

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

_NO_SPACE = "free space, or choose another folder"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to be written.

    Attributes:
        name: Its name.
        dtype: Key of :data:`FORMAT_NAMES`.
        shape: Sizes, in elements.
        nbytes: Bytes.
        load: Returns the bytes, row-major. Called when they are about to be written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    load: Callable[[], memoryview]


def write_checkpoint(
    tensors: Mapping[str, torch.Tensor],
    folder: Path | str,
    *,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write tensors as safetensors files, without changing any bit.

    Writes one file, ``model.safetensors``, or several files and an index when it would exceed `shard_bytes`. Tensors
    that share their memory (tied weights) are stored once, under the first name. The metadata of the file names the
    others, as safetensors' own ``save_model`` does, and :func:`open_checkpoint` reads them from there.

    Files get their final names only when all of them are completely on disk. A call that fails before leaves the folder
    as it was. A call that is interrupted during renaming never leaves a folder that opens as a mixture.

    It reads every byte and waits for the disk, so call it in a worker thread.

    Args:
        tensors: By name; on any device.
        folder: Created when it does not exist.
        overwrite: Replace the safetensors files and the index in the folder.
        metadata: Added to every file, besides ``format: pt``.
        shard_bytes: Most bytes in one file, unless a single tensor is larger.

    Returns:
        The files written, in order.

    Raises:
        CheckpointError: There are weight files already, a dtype is not supported, or a file can't be written.
    """
    unfit = [f"{name} ({t.dtype})" for name, t in tensors.items() if _dtype(t) not in FORMAT_NAMES]
    if unfit or "__metadata__" in tensors:
        raise CheckpointError(f"safetensors files can't hold {', '.join(unfit[:5]) or 'a tensor named __metadata__'}")
    owners: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    entries: list[Entry] = []
    for name, tensor in tensors.items():
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        owner = owners.setdefault(key, name) if tensor.numel() else name
        if owner != name:
            aliases[name] = owner
            continue
        entries.append(Entry(name, _dtype(tensor), tuple(tensor.shape), tensor.nbytes, _loader(tensor)))
    facts = {"format": "pt", **(metadata or {})}
    return write_entries(entries, Path(folder), facts, aliases, overwrite=overwrite, shard_bytes=shard_bytes)


def write_entries(
    entries: Sequence[Entry],
    folder: Path,
    metadata: Mapping[str, str],
    aliases: Mapping[str, str],
    *,
    overwrite: bool,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write entries as :func:`write_checkpoint` does; `aliases` maps further names to names of entries."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = [file for end in (WEIGHT_SUFFIX, INDEX_SUFFIX) for file in sorted(folder.glob(f"[!.]*{end}"))]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be used: {error}", hint="choose another folder") from error
    if present and not overwrite:
        raise CheckpointError(f"{present[0]} is there already", hint="choose another folder, or overwrite")
    shards = _shards(entries, shard_bytes)
    names = [f"model-{n:05d}-of-{len(shards):05d}{WEIGHT_SUFFIX}" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"model{WEIGHT_SUFFIX}"]
    with contextlib.ExitStack() as cleanup:
        # The index comes last: without an index, shards count as complete only when all of them exist.
        made = [
            (_write_file(folder / name, shard, _own(metadata, aliases, shard), cleanup), folder / name)
            for name, shard in zip(names, shards, strict=True)
        ]
        if len(shards) > 1:
            index = folder / f"model{INDEX_SUFFIX}"
            made.append((_write(index, [_index(names, shards)], cleanup), index))
        _put_in_place(made, present)
    return [place for _, place in made]


def _put_in_place(made: Sequence[tuple[Path, Path]], present: Sequence[Path]) -> None:
    """Replace old files by new ones. At any time a reader finds files of one set only, never of both."""
    try:
        if list(present) != [place for _, place in made] or len(made) > 1:
            # Remove the index first: without it, the names of the shards still show that some are missing.
            for file in sorted(present, key=lambda file: not file.name.endswith(INDEX_SUFFIX)):
                file.unlink(missing_ok=True)
        for temporary, place in made:
            temporary.replace(place)
    except OSError as error:
        raise CheckpointError(f"the new files cannot be put in place: {error}", hint="write to a new folder") from error


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _loader(tensor: torch.Tensor) -> Callable[[], memoryview]:
    def load() -> memoryview:
        import torch

        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")

    return load


def _shards(entries: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    # Wide elements first, so that each tensor starts at a multiple of its element size. The sort is stable.
    return [sorted(shard, key=lambda entry: -ITEM_BYTES[entry.dtype]) for shard in shards]


def _own(metadata: Mapping[str, str], aliases: Mapping[str, str], shard: Sequence[Entry]) -> dict[str, str]:
    """The metadata of one shard: the common metadata, and the aliases of its own tensors."""
    names = {entry.name for entry in shard}
    return {**metadata, **{alias: owner for alias, owner in aliases.items() if owner in names}}


def _index(names: Sequence[str], shards: Sequence[Sequence[Entry]]) -> bytes:
    weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    total = sum(entry.nbytes for shard in shards for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return msgspec.json.format(msgspec.json.encode(index), indent=2) + b"\n"


def _write_file(
    place: Path, entries: Sequence[Entry], metadata: Mapping[str, str], cleanup: contextlib.ExitStack
) -> Path:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for entry in entries:
        # The format counts elements of 4 bits one by one, torch in pairs.
        shape = [*entry.shape[:-1], entry.shape[-1] * 2] if entry.dtype == "float4_e2m1fn_x2" else list(entry.shape)
        header[entry.name] = {
            "dtype": FORMAT_NAMES[entry.dtype],
            "shape": shape,
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    encoded = msgspec.json.encode(header)
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > _MAX_HEADER:
        raise CheckpointError(f"{place} would have a header of {len(encoded)} bytes", hint="use smaller shards")
    start = len(encoded).to_bytes(8, "little") + encoded
    return _write(place, [start, *(entry.load for entry in entries)], cleanup)


def _write(place: Path, parts: Iterable[bytes | Callable[[], memoryview]], cleanup: contextlib.ExitStack) -> Path:
    """Write a temporary file beside `place`, complete on disk; removed when `cleanup` ends, unless it was renamed."""
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb", buffering=0) as file:
            cleanup.callback(temporary.unlink, missing_ok=True)
            for part in parts:
                _write_all(file.fileno(), part if isinstance(part, bytes) else part())
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(f"{place} cannot be written: {error}", hint=_NO_SPACE) from error
    return temporary


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left[: 1 << 30]) :]
