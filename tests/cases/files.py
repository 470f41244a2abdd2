"""Small checkpoints for the cases."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from netloader import ModelIdentity, sync

IDENTITY = ModelIdentity(model="m", layout="checkpoint")


def tensors(*names: str, seed: int = 1) -> dict[str, torch.Tensor]:
    """A tensor for each name."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(16, 8, generator=generator) for name in names}


def save(folder: Path, name: str, content: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write one file as any other tool does."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(content), file, metadata)
    return file


def save_index(folder: Path, placed: Mapping[str, str]) -> None:
    """Write the usual index."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict(placed)}))


def metadata_of(file: Path) -> dict[str, str]:
    """The metadata in a file, as any other tool reads it."""
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


@contextmanager
def served(content: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Serve tensors in this process, and give the address."""
    with sync.serve(dict(content), IDENTITY, host="127.0.0.1", transport="tcp") as server:
        yield str(server.address)
