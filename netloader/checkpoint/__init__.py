"""Checkpoints, which are folders of safetensors files: opened without copying, and written atomically."""

from __future__ import annotations

from netloader.checkpoint.demo import make_demo_checkpoint
from netloader.checkpoint.fingerprint import fingerprint_of
from netloader.checkpoint.layout import SHARD_BYTES
from netloader.checkpoint.names import repo_id_of
from netloader.checkpoint.output import OutputFolder
from netloader.checkpoint.reading import Checkpoint, open_checkpoint
from netloader.checkpoint.writing import write_checkpoint

__all__ = [
    "SHARD_BYTES",
    "Checkpoint",
    "OutputFolder",
    "fingerprint_of",
    "make_demo_checkpoint",
    "open_checkpoint",
    "repo_id_of",
    "write_checkpoint",
]
