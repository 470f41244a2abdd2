"""Opening a checkpoint: one safetensors file, or several with an index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from netloader.checkpoint import metadata as texts
from netloader.checkpoint.file_errors import diagnosed, unreadable
from netloader.checkpoint.files import (
    FETCH_AGAIN,
    INDEX_SUFFIX,
    WEIGHT_SUFFIX,
    WeightFiles,
    check_present,
    choose_files,
    file_line,
    folders_with_weights,
    whole_checkpoint_of,
)
from netloader.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "open_checkpoint"]

_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz", ".index.json")
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
        weight_files: Names of the safetensors files, relative to the folder, in order.
        extra_files: Names of the small files in the folder (configuration, tokenizer), in order.
        metadata: What the files say about themselves (``__metadata__``), without the names of tied tensors. An entry
            that some files lack belongs to all of them; one that differs between files is left out.
        left_out: What the folder holds and the checkpoint does not, with the reason: one line for each kind.
    """

    folder: Path
    tensors: Mapping[str, torch.Tensor]
    weight_files: tuple[str, ...]
    extra_files: tuple[str, ...]
    metadata: Mapping[str, str]
    left_out: tuple[str, ...]


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Args:
        path: A folder with one safetensors file, with several and an index (``*.safetensors.index.json``), or with
            several that have no tensor in common; or one safetensors file. :mod:`netloader.checkpoint.files` says which
            files of a folder are used.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: There is no safetensors file, or one is missing, damaged, duplicate, or can't be read; or the
            path is one of several files of a checkpoint.
    """
    path = Path(path)
    try:
        folder, chosen = _chosen(path)
        left_out = _files_left_out(folder, chosen) if path.is_dir() else []
        found: dict[str, torch.Tensor] = {}
        homes: dict[str, str] = {}
        aliases: dict[str, str] = {}
        described: list[dict[str, str]] = []
        for name in chosen.names:
            tensors, metadata = _open_file(folder / name)
            mine, ignored = _used(folder, name, tensors, homes, chosen)
            left_out += ignored
            homes |= dict.fromkeys(mine, name)
            found |= mine
            rest, tied = _split(folder / name, metadata, tensors)
            described.append(rest)
            aliases |= {alias: owner for alias, owner in tied.items() if owner in mine}
        _check_complete(folder, found, chosen)
        extra = _extra_files(folder)
    except OSError as error:
        raise unreadable(path, error) from error
    facts, differing = texts.merged(described)
    if differing:
        left_out.append(f"metadata {file_line(differing)}: the files have different values for it")
    texts.check_size(facts)
    ordered = {name: found[name] for name in sorted(found)}
    ordered |= {alias: found[owner] for alias, owner in sorted(aliases.items()) if alias not in found}
    return Checkpoint(folder, ordered, chosen.names, extra, facts, tuple(left_out))


def _chosen(path: Path) -> tuple[Path, WeightFiles]:
    """The folder, and the files to open.

    Raises:
        CheckpointError: There is none.
        OSError: The folder can't be listed.
    """
    if path.is_dir():
        chosen = choose_files(path)
        if not chosen.names:
            raise _without_weights(path)
        check_present(path, chosen)
        return path, chosen
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist", hint="give a folder with safetensors files")
    if why := whole_checkpoint_of(path):
        raise CheckpointError(why, hint=f"give the folder: {path.parent}")
    return path.parent, WeightFiles((path.name,))


def _without_weights(folder: Path) -> CheckpointError:
    below = folders_with_weights(folder)
    if below:
        return CheckpointError(
            f"{folder} has no safetensors file of its own, but its folders {file_line(below)} have",
            hint=f"give one of them, such as {folder / below[0]}",
        )
    others = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
    if others:
        return CheckpointError(f"{folder} has no safetensors file (but {others[0]})", hint="convert it to safetensors")
    return CheckpointError(f"{folder} has no safetensors file ", hint="give a folder with *.safetensors")


def _files_left_out(folder: Path, chosen: WeightFiles) -> list[str]:
    lines = []
    if chosen.left_out:
        lines.append(f"{file_line(chosen.left_out)}: {chosen.reason}")
    used = {name.partition("/")[0] for name in chosen.names if "/" in name}
    below = [name for name in folders_with_weights(folder) if name not in used]
    if below:
        lines.append(f"weights in the folders {file_line(below)}: they are models of their own, serve each by itself")
    return lines


def _used(
    folder: Path, name: str, tensors: Mapping[str, torch.Tensor], homes: Mapping[str, str], chosen: WeightFiles
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of one file that are part of the checkpoint, and a line for each kind of the others.

    Raises:
        CheckpointError: Without an index, two files hold a tensor of one name.
    """
    if chosen.placed is None:
        for tensor in tensors:
            if tensor in homes:
                raise CheckpointError(
                    f"{folder / name} holds {tensor}, and so does {homes[tensor]}",
                    hint="remove the file that does not belong here",
                )
        return dict(tensors), []
    unknown = [tensor for tensor in tensors if tensor not in chosen.placed]
    elsewhere = [tensor for tensor in tensors if chosen.placed.get(tensor, name) != name]
    lines = []
    if unknown:
        lines.append(f"tensors {file_line(unknown)} of {name}: {chosen.index} does not name them")
    if elsewhere:
        where = file_line(sorted({chosen.placed[tensor] for tensor in elsewhere}))
        lines.append(f"tensors {file_line(elsewhere)} of {name}: {chosen.index} places them in {where}")
    return {tensor: tensors[tensor] for tensor in tensors if chosen.placed.get(tensor) == name}, lines


def _split(
    file: Path, metadata: Mapping[str, str], tensors: Mapping[str, object]
) -> tuple[dict[str, str], dict[str, str]]:
    try:
        return texts.split(metadata, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error.message}", hint=error.hint) from error


def _open_file(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            return tensors, opened.metadata() or {}
    except (SafetensorError, OSError, RuntimeError, KeyError, ValueError, MemoryError) as error:
        cause = diagnosed(file)
        if cause is not None:
            raise unreadable(file, cause) from cause
        if isinstance(error, MemoryError):
            raise CheckpointError(f"{file} cannot be opened: no memory is left", hint="free memory") from error
        raise CheckpointError(
            f"{file} ({_size(file)}) is no complete safetensors file: {error}", hint=FETCH_AGAIN
        ) from error


def _size(file: Path) -> str:
    try:
        return f"{file.stat().st_size} bytes"
    except OSError as error:
        return error.strerror or type(error).__name__


def _check_complete(folder: Path, found: Mapping[str, torch.Tensor], chosen: WeightFiles) -> None:
    for name, file in (chosen.placed or {}).items():
        if name not in found:
            raise CheckpointError(
                f"{folder / file} lacks {name}, which {chosen.index} expects there",
                hint=f"{FETCH_AGAIN}: the index and the files do not belong together",
            )


def _extra_files(folder: Path) -> tuple[str, ...]:
    return tuple(
        file.name
        for file in sorted(folder.iterdir())
        if not file.name.startswith(".")
        and not file.name.endswith((WEIGHT_SUFFIX, INDEX_SUFFIX, *_OTHER_WEIGHTS))
        and file.is_file()
        and file.stat().st_size <= _EXTRA_BYTES
    )
