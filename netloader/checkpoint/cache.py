"""Finds the folder of a model: a folder itself, a repository in a Hugging Face cache, or a repository id.

Only files of this machine are looked at; nothing is downloaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from netloader.checkpoint.file_errors import unreadable
from netloader.checkpoint.names import repo_id_of
from netloader.errors import CheckpointError

__all__ = ["cache_folder", "find_folder", "model_name"]

_REPOSITORY_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?", re.ASCII)
_REPOSITORY = re.compile(r"models--.+", re.DOTALL)


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The Hugging Face cache of this user, as ``huggingface_hub`` finds it."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(name):
            return Path(environment[name]).expanduser()
    if environment.get("HF_HOME"):
        return Path(environment["HF_HOME"]).expanduser() / "hub"
    base = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"


def find_folder(path: Path) -> Path:
    """Find the folder, or the file, that is meant by `path`.

    Args:
        path: A folder or file, which is returned as it is; a repository in a cache (``models--org--name``), whose
            snapshot is returned; or a repository id (``org/name``), which is looked up in the cache of this user.

    Raises:
        CheckpointError: There is none, or several snapshots.
    """
    try:
        if path.is_dir():
            if _REPOSITORY.fullmatch(path.name) and (path / "snapshots").is_dir():
                return _snapshot(path)
            return path
        if path.exists() or not _REPOSITORY_ID.fullmatch(str(path)):
            return path
        cached = cache_folder() / f"models--{str(path).replace('/', '--')}"
        if (cached / "snapshots").is_dir():
            return _snapshot(cached)
    except OSError as error:
        raise unreadable(path, error) from error
    raise CheckpointError(
        f"{path} does not exist, and is not a repository in the Hugging Face cache {cache_folder()}",
        hint=f"give a folder with safetensors files, or download it first: hf download {path}",
    )


def _snapshot(repository: Path) -> Path:
    """The snapshot of the revision ``main``, or the only one."""
    snapshots = sorted(folder for folder in (repository / "snapshots").iterdir() if folder.is_dir())
    main = repository / "refs" / "main"
    if main.is_file():
        commit = main.read_text(encoding="utf-8", errors="replace").strip()
        found = [snapshot for snapshot in snapshots if snapshot.name == commit]
        if found:
            return found[0]
    if len(snapshots) == 1:
        return snapshots[0]
    if not snapshots:
        raise CheckpointError(f"{repository} has no snapshot", hint=f"hf download {_id_of(repository)}")
    raise CheckpointError(
        f"{repository} has {len(snapshots)} snapshots, and none of them is that of the revision main",
        hint=f"give one of them, such as {snapshots[0]}",
    )


def _id_of(repository: Path) -> str:
    return repo_id_of(repository / "snapshots" / "any")


def model_name(folder: Path) -> str:
    """The name of the model in `folder`: its repository id in a cache, else the name of the folder."""
    whole = folder.absolute()
    return repo_id_of(whole) or repo_id_of(whole.resolve()) or whole.resolve().name
