"""Writes a checkpoint: safetensors files, directly from the tensors' memory, renamed into place when complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from netloader.checkpoint.file_errors import unwritable
from netloader.checkpoint.files import INDEX_SUFFIX, WEIGHT_SUFFIX
from netloader.checkpoint.layout import (
    SHARD_BYTES,
    Stored,
    check_storable,
    header_of,
    index_of,
    own_metadata,
    shard_names,
    shards_of,
)
from netloader.checkpoint.parts import Part, put_in_place
from netloader.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["Entry", "weight_files_in", "write_checkpoint", "write_entries"]


@dataclass(frozen=True, slots=True)
class Entry(Stored):
    """One tensor to be written.

    Attributes:
        load: Returns the bytes, row-major. Called when they are about to be written.
    """

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
        metadata: Written into every file; ``format: pt`` is added unless it says another format.
        shard_bytes: Most bytes in one file, unless a single tensor is larger.

    Returns:
        The files written, in order.

    Raises:
        CheckpointError: There are weight files already, a dtype is not supported, or a file can't be written.
    """
    check_storable((name, _dtype(tensor), tensor.shape) for name, tensor in tensors.items())
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
        present = weight_files_in(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be used: {error}", hint="choose another folder") from error
    if present and not overwrite:
        raise CheckpointError(f"{present[0]} is there already", hint="choose another folder, or overwrite")
    shards = shards_of(entries, shard_bytes)
    names = shard_names(len(shards))
    with contextlib.ExitStack() as cleanup:
        # The index comes last: without an index, shards count as complete only when all of them exist.
        made = [
            _write_file(folder / name, shard, own_metadata(metadata, aliases, shard), cleanup)
            for name, shard in zip(names, shards, strict=True)
        ]
        if len(shards) > 1:
            made.append(_write(folder / f"model{INDEX_SUFFIX}", [index_of(names, shards)], cleanup))
        return put_in_place(made, present)


def weight_files_in(folder: Path) -> list[Path]:
    """The safetensors files and indexes in `folder`, which new files would replace."""
    return [file for end in (WEIGHT_SUFFIX, INDEX_SUFFIX) for file in sorted(folder.glob(f"[!.]*{end}"))]


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _loader(tensor: torch.Tensor) -> Callable[[], memoryview]:
    def load() -> memoryview:
        import torch

        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")

    return load


def _write_file(
    place: Path, entries: Sequence[Entry], metadata: Mapping[str, str], cleanup: contextlib.ExitStack
) -> Part:
    start = header_of(place.name, entries, metadata)
    return _write(place, [start, *(entry.load for entry in entries)], cleanup)


def _write(place: Path, parts: Iterable[bytes | Callable[[], memoryview]], cleanup: contextlib.ExitStack) -> Part:
    """Write a part for `place`, complete on disk; removed when `cleanup` ends, unless it was put in place."""
    made = Part(place)
    cleanup.callback(made.remove)
    try:
        for part in parts:
            _write_all(made.descriptor, part if isinstance(part, bytes) else part())
        os.fsync(made.descriptor)
    except OSError as error:
        raise unwritable(place, error) from error
    return made


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left[: 1 << 30]) :]
