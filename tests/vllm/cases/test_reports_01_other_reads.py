"""Values that a constructor reads with NumPy or a parser of its own, and keeps in a list, are refused by name."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models import ModelStore
from tests.vllm.pulls import LogLines, Seeds, load, pull, source_of

pytestmark = pytest.mark.usefixtures("needs_vllm")

VALUES = np.arange(8, dtype=np.float32)


def by_load(file: Path) -> Any:
    return np.load(file)


def by_fromfile(file: Path) -> Any:
    return np.fromfile(file, dtype=np.float32)


def by_pickle(file: Path) -> Any:
    with file.open("rb") as opened:
        return pickle.load(opened)


WRITERS: dict[Callable[[Path], Any], tuple[str, Callable[[Path], object]]] = {
    by_load: ("prior.npy", lambda file: np.save(file, VALUES)),
    by_fromfile: ("prior.bin", VALUES.tofile),
    by_pickle: ("prior.pkl", lambda file: file.write_bytes(pickle.dumps(VALUES))),
}


@pytest.mark.parametrize("read", WRITERS)
def test_values_that_are_read_without_safetensors_or_torch_are_refused_by_name(
    read: Callable[[Path], Any],
    seeds: Seeds,
    models: ModelStore,
    tmp_path: Path,
    log_lines: LogLines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.model_executor.models.llama import LlamaForCausalLM

    honest = seeds.get("llama-bf16")
    name, write = WRITERS[read]
    folder = shutil.copytree(models.get("llama-bf16"), tmp_path / "model")
    write(folder / name)
    original = LlamaForCausalLM.__init__

    def built(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        original(self, vllm_config=vllm_config, prefix=prefix)
        self.prior = [read(folder / name)]

    monkeypatch.setattr(LlamaForCausalLM, "__init__", built)
    log_lines.lines.clear()
    load(folder)
    line = log_lines.one("does not serve its target")
    assert f"{folder / name} (read by other means than safetensors and torch.load)" in line
    with source_of(honest.holding) as source:
        assert pull(folder, source).raw == honest.disk
    assert name in log_lines.one("the default loader (auto) loads the target", "read by other means")
