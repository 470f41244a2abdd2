"""Which files of a folder hold the weights of its model: one rule for serving, pulling and fingerprints.

1. An index (``*.safetensors.index.json``) decides: the files that it names, in sub-folders too.
2. Without an index: ``model.safetensors``.
3. Without both: all safetensors files, except those that are known to be something else (an adapter, a second copy).

Whatever is left out is named, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec

from netloader.checkpoint.file_errors import unreadable
from netloader.errors import CheckpointError

__all__ = [
    "FETCH_AGAIN",
    "INDEX_SUFFIX",
    "SHARD_NAME",
    "WEIGHT_SUFFIX",
    "WeightFiles",
    "check_present",
    "choose_files",
    "file_line",
    "folders_with_weights",
    "whole_checkpoint_of",
]

WEIGHT_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")

FETCH_AGAIN = "fetch the checkpoint again"

_WHOLE = f"model{WEIGHT_SUFFIX}"
_USUAL_INDEX = f"model{INDEX_SUFFIX}"
_NOT_THE_MODEL = ("adapter", "consolidated", "optimizer", "scheduler", "pytorch_lora_weights")
"""Beginnings of the names of files that lie beside a model and are no part of it."""

_MOST_FOLDERS = 1000
_SHOWN = 5


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weight files of a folder.

    Attributes:
        names: The files, relative to the folder, in order. They need not exist: see :func:`check_present`.
        index: Name of the index that decided; empty without one.
        placed: The file of each tensor, if there is an index.
        left_out: Safetensors files of the folder that are not used.
        reason: Why they are not.
    """

    names: tuple[str, ...]
    index: str = ""
    placed: Mapping[str, str] | None = None
    left_out: tuple[str, ...] = ()
    reason: str = ""


def choose_files(folder: Path) -> WeightFiles:
    """Choose the weight files of `folder`.

    Returns:
        The files; none when the folder has no safetensors file and no index.

    Raises:
        CheckpointError: Several indexes, or an index that can't be read or names files outside of the folder.
        OSError: The folder can't be listed.
    """
    listed = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    files = tuple(name for name in listed if name.endswith(WEIGHT_SUFFIX))
    index = _index_of(folder, [name for name in listed if name.endswith(INDEX_SUFFIX)])
    if index:
        placed = _read_index(folder / index)
        names = tuple(sorted(set(placed.values())))
        return WeightFiles(names, index, placed, _without(files, names), f"{index} does not name it")
    if _WHOLE in files:
        return WeightFiles((_WHOLE,), left_out=_without(files, (_WHOLE,)), reason=f"{_WHOLE} is the whole model")
    others = tuple(name for name in files if name.startswith(_NOT_THE_MODEL))
    if len(others) in (0, len(files)):
        return WeightFiles(files)
    return WeightFiles(
        _without(files, others), left_out=others, reason="by its name it is an adapter, or a copy in another form"
    )


def _without(files: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in files if name not in names)


def _index_of(folder: Path, indexes: Sequence[str]) -> str:
    if _USUAL_INDEX in indexes or not indexes:
        return _USUAL_INDEX if indexes else ""
    if len(indexes) > 1:
        raise CheckpointError(
            f"{folder} has several indexes: {', '.join(indexes)}", hint="keep one checkpoint in a folder"
        )
    return indexes[0]


def _read_index(index: Path) -> dict[str, str]:
    try:
        placed = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except OSError as error:
        raise unreadable(index, error) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}", hint=FETCH_AGAIN) from error
    for name in set(placed.values()):
        if not _inside(name):
            raise CheckpointError(
                f"{index} names {name!r}, which is not a safetensors file of this folder",
                hint="an index names files below its own folder; use the index of this checkpoint",
            )
    return placed


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return name == str(path) and not path.is_absolute() and ".." not in path.parts and name.endswith(WEIGHT_SUFFIX)


def check_present(folder: Path, chosen: WeightFiles) -> None:
    """Check that no file is missing: the index says which there are, or the names of the shards.

    Raises:
        CheckpointError: One is missing.
    """
    for name in chosen.names:
        if chosen.index and not _is_there(folder / name):
            raise CheckpointError(f"{folder / name} is missing, {chosen.index} names it", hint=_missing_hint(folder))
        match = SHARD_NAME.fullmatch(name)
        if chosen.index or match is None:
            continue
        for number in range(1, int(match["count"]) + 1):
            other = f"{match['stem']}-{number:05d}-of-{match['count']}{WEIGHT_SUFFIX}"
            if other not in chosen.names:
                raise CheckpointError(
                    f"{folder / other} is missing, {name} is one of {int(match['count'])}", hint=FETCH_AGAIN
                )


def _missing_hint(folder: Path) -> str:
    if (folder / _WHOLE).is_file():
        return f"{FETCH_AGAIN}, or remove the index if {_WHOLE} is the whole model"
    return FETCH_AGAIN


def _is_there(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError as error:
        raise unreadable(file, error) from error


def folders_with_weights(folder: Path) -> tuple[str, ...]:
    """Names of the folders directly below `folder` that hold safetensors files, in order."""
    found = []
    for below in sorted(folder.iterdir())[:_MOST_FOLDERS]:
        try:
            if below.name.startswith(".") or not below.is_dir():
                continue
            if any(name.endswith(WEIGHT_SUFFIX) and not name.startswith(".") for name in _names_in(below)):
                found.append(below.name)
        except OSError:  # whose contents are not known: no weights that could be meant
            continue
    return tuple(found)


def _names_in(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def whole_checkpoint_of(file: Path) -> str:
    """Why `file` is not a checkpoint by itself; empty when it may be one."""
    folder = file.parent
    try:
        chosen = choose_files(folder)
    except (CheckpointError, OSError):
        chosen = WeightFiles(())
    if chosen.index and file.name in chosen.names and len(chosen.names) > 1:
        return f"{file} is one of {len(chosen.names)} files that {chosen.index} names"
    match = SHARD_NAME.fullmatch(file.name)
    if match is not None and int(match["count"]) > 1:
        return f"{file} is, by its name, one of {int(match['count'])} files"
    return ""


def file_line(names: Sequence[str]) -> str:
    """Names in one line: the first ones, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
