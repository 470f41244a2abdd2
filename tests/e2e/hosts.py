"""Folders that simulate hosts: each has the model at the same relative path, with or without weight files."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.models import ModelStore

MODEL = "model"
DRAFT = "draft"
ASLEEP = {"VLLM_SLEEP_WHEN_IDLE": "1"}
"""What the guide's commands set."""


def make_hosts(folder: Path, models: ModelStore, kind: str, *, draft: str | None = None) -> tuple[Path, Path]:
    """A host with all files of a model, and one with all files except its weight files."""
    full, bare = folder / "full", folder / "bare"
    for host, find in ((full, models.get), (bare, models.bare)):
        host.mkdir(parents=True)
        (host / MODEL).symlink_to(find(kind))
        if draft is not None:
            (host / DRAFT).symlink_to(find(draft))
    return full, bare


def listens(address: str) -> bool:
    """Whether something accepts connections at `address`."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            return True
    except OSError:
        return False
