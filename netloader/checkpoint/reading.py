"""Opening a checkpoint: one safetensors file, or several with an index."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from netloader.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["INDEX_SUFFIX", "SHARD_NAME", "WEIGHT_SUFFIX", "Checkpoint", "open_checkpoint"]

WEIGHT_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")

_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz", ".index.json")
_AGAIN = "fetch the checkpoint again"
_EXTRA_BYTES = 64 << 20
"""Size limit of an extra file. A tokenizer with a large vocabulary has half of that."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        folder: The folder.
        tensors: By name: all tensors in the order of their names, then the aliases. The order does not depend on the
            files, so that equal weights have an equal root. The tensors are private mappings of the files: bytes are
            read on first use, nothing is copied, and writing to a tensor does not change its file. The files must not
            be changed in place while they are used.
        weight_files: Names of the safetensors files, in order.
        extra_files: Names of the small files in the folder (configuration, tokenizer), in order.
    """

    folder: Path
    tensors: Mapping[str, torch.Tensor]
    weight_files: tuple[str, ...]
    extra_files: tuple[str, ...]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Args:
        path: A folder with one safetensors file, with several and an index (``*.safetensors.index.json``), or with
            several that have no tensor in common; or one safetensors file.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: There is no safetensors file, or one is missing, truncated, duplicate, or not part of the
            checkpoint.
    """
    path = Path(path)
    files: tuple[Path, ...] = (path,)
    placed: dict[str, str] | None = None
    if path.is_dir():
        files, placed = _weight_files(path)
    elif not path.is_file():
        raise CheckpointError(f"{path} does not exist", hint="give a folder with safetensors files")
    found: dict[str, torch.Tensor] = {}
    homes: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for file in files:
        tensors, metadata = _open_file(file)
        _check_placed(file, tensors, homes, placed)
        homes |= dict.fromkeys(tensors, file.name)
        found |= tensors
        aliases |= metadata
    _check_complete(path, found, placed)
    ordered = {name: found[name] for name in sorted(found)}
    # safetensors' own `save_model` records tensors that share the memory of another one in the metadata.
    for name, owner in sorted(aliases.items()):
        if name != "format" and name not in found and owner in found:
            ordered[name] = found[owner]
    folder = path if path.is_dir() else path.parent
    return Checkpoint(folder, ordered, tuple(file.name for file in files), _extra_files(folder))


def _weight_files(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The files to open, and the file of each tensor if there is an index."""
    files = sorted(file for file in folder.glob(f"*{WEIGHT_SUFFIX}") if not file.name.startswith("."))
    index = _index_file(folder)
    if index is None:
        if not files:
            others = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
            beside = f" (but {others[0]})" if others else ""
            raise CheckpointError(f"{folder} has no safetensors file{beside}", hint="convert it to safetensors")
        _check_shards(folder, {file.name for file in files})
        return tuple(files), None
    placed = _read_index(index)
    wanted = set(placed.values())
    for name in sorted(wanted):
        if Path(name).name != name or not name.endswith(WEIGHT_SUFFIX):
            raise CheckpointError(f"{index} names {name!r}, which is not a safetensors file of this folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing, {index.name} names it", hint=_AGAIN)
    stems = {match["stem"] for name in wanted if (match := SHARD_NAME.fullmatch(name))}
    for file in files:
        match = SHARD_NAME.fullmatch(file.name)
        # Other files beside the shards, such as one consolidated copy of all weights, are no error.
        if file.name not in wanted and match is not None and match["stem"] in stems:
            raise CheckpointError(
                f"{file} is not named by {index.name}", hint="it is left from another checkpoint: remove it"
            )
    return tuple(folder / name for name in sorted(wanted)), placed


def _index_file(folder: Path) -> Path | None:
    indexes = sorted(file for file in folder.glob(f"*{INDEX_SUFFIX}") if not file.name.startswith("."))
    usual = folder / f"model{INDEX_SUFFIX}"
    if usual in indexes or not indexes:
        return usual if indexes else None
    if len(indexes) > 1:
        names = ", ".join(file.name for file in indexes)
        raise CheckpointError(f"{folder} has several indexes: {names}", hint="keep one checkpoint in a folder")
    return indexes[0]


def _read_index(index: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}", hint=_AGAIN) from error


def _check_shards(folder: Path, names: set[str]) -> None:
    """Check that no shard is missing: without an index, the names of the shards say how many there are."""
    for name in sorted(names):
        match = SHARD_NAME.fullmatch(name)
        if match is None:
            continue
        for number in range(1, int(match["count"]) + 1):
            other = f"{match['stem']}-{number:05d}-of-{match['count']}{WEIGHT_SUFFIX}"
            if other not in names:
                raise CheckpointError(
                    f"{folder / other} is missing, {name} is one of {int(match['count'])}",
                    hint=_AGAIN,
                )


def _open_file(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            return tensors, opened.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{file} ({_size(file)}) is no complete safetensors file: {error}", hint=_AGAIN
        ) from error


def _size(file: Path) -> str:
    try:
        return f"{file.stat().st_size} bytes"
    except OSError as error:
        return error.strerror or type(error).__name__


def _check_placed(
    file: Path, tensors: Iterable[str], homes: Mapping[str, str], placed: Mapping[str, str] | None
) -> None:
    for name in tensors:
        if name in homes:
            raise CheckpointError(
                f"{file} holds {name}, and so does {homes[name]}", hint="remove the file that does not belong here"
            )
        if placed is not None and placed.get(name) != file.name:
            where = f"the index expects it in {placed[name]}" if name in placed else "the index does not name it"
            raise CheckpointError(f"{file} holds {name}, but {where}", hint=_AGAIN)


def _check_complete(path: Path, found: Mapping[str, torch.Tensor], placed: Mapping[str, str] | None) -> None:
    for name, file in (placed or {}).items():
        if name not in found:
            raise CheckpointError(f"{path / file} lacks {name}, which the index expects there", hint=_AGAIN)


def _extra_files(folder: Path) -> tuple[str, ...]:
    return tuple(
        file.name
        for file in sorted(folder.iterdir())
        if not file.name.startswith(".")
        and not file.name.endswith((WEIGHT_SUFFIX, *_OTHER_WEIGHTS))
        and file.is_file()
        and file.stat().st_size <= _EXTRA_BYTES
    )
