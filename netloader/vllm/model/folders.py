"""Where the files of a model lie on this host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["downloaded", "folder_of", "folder_of_config"]


def folder_of(model_config: Any) -> Path | None:
    """The folder of the model's files; None when there is none on this host (yet)."""
    return _folder(str(model_config.model), model_config.revision)


def folder_of_config(model_config: Any, path: str) -> Path | None:
    """The folder at vLLM's ``--hf-config-path``, which names a folder or a repository; None when there is none here."""
    # vLLM resolves the revision for this repository, where it is not the model's.
    return _folder(path, getattr(model_config, "_hf_config_revision", None) or model_config.revision)


def _folder(name: str, revision: str | None) -> Path | None:
    path = Path(name)
    return path if path.exists() else downloaded(name, revision)


def downloaded(name: str, revision: str | None) -> Path | None:
    """The folder of a model that was downloaded from a hub; None when it was not. Uses no network."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    for file in ("config.json", "params.json"):
        try:
            found = try_to_load_from_cache(name, file, revision=revision)
        except (HFValidationError, ValueError):
            return None  # not the name of a model on a hub, but for example the URL of an object store
        if isinstance(found, str):
            return Path(found).parent
    return None
