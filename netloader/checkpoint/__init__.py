"""Checkpoints, which are folders of safetensors files: opened without copying, and written atomically."""

from __future__ import annotations

from netloader.checkpoint.demo import make_demo_checkpoint
from netloader.checkpoint.fingerprint import fingerprint_of
from netloader.checkpoint.reading import Checkpoint, open_checkpoint
from netloader.checkpoint.writing import SHARD_BYTES, write_checkpoint

__all__ = ["SHARD_BYTES", "Checkpoint", "fingerprint_of", "make_demo_checkpoint", "open_checkpoint", "write_checkpoint"]
