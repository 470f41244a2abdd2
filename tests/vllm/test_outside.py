"""Weights that `named_modules` does not reach are served and pulled like all others, or the model is refused by name.

A sentence-transformers model has a Dense projector with a weight file of its own. vLLM reads it while it builds the
model, and keeps it in a plain mapping. These tests compare each tensor of the projector.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from netloader.transports.faults import Fault, FaultKind
from netloader.vllm.live.reloading import ReloadRefused
from netloader.vllm.model.snapshot import named_raw_tensors
from netloader.vllm.serve import serving
from tests.models import DENSE, ModelStore
from tests.vllm import harness
from tests.vllm.pulls import LogLines, Seed, Seeds, extra, load, offered, pull, source_of
from tests.vllm.reloads import reload

pytestmark = pytest.mark.usefixtures("needs_vllm")

EMBED: dict[str, Any] = {"runner": "pooling", "convert": "embed"}
NOT_NAMED = "the model reads tensors from files while it is built, and not all of them are weights that have a name"


def projector(model: Any) -> dict[str, str]:
    """Digests of the projector for embeddings; empty when the model has none."""
    found = model.pooler.poolers_by_task["embed"].head.projector
    return {} if found is None else {name: harness.tensor_digest(t) for name, t in found.state_dict().items()}


def by_default(folder: Path) -> harness.Loaded:
    """A model that vLLM's own loader has loaded from a folder."""
    return harness.load(harness.engine_config(folder, **EMBED))


@pytest.fixture(scope="module")
def seed(seeds: Seeds) -> Seed:
    folder = seeds.models.get("embedder")
    loaded, holding = offered(folder, {}, EMBED)
    return Seed(loaded, holding, by_default(folder).raw)


def with_dense_of(folder: Path, other: Path, target: Path) -> Path:
    """A copy of `folder` with the projector's weight file of `other`."""
    shutil.copytree(folder, target)
    shutil.copy2(other / DENSE, target / DENSE)
    return target


def test_a_projector_is_named_and_served(seed: Seed, models: ModelStore) -> None:
    ours = projector(seed.loaded.model)
    assert set(ours) == {"0.weight", "0.bias"}
    assert ours == projector(by_default(models.get("embedder")).model)
    assert ours != projector(by_default(models.get("embedder-other-dense")).model), "the test can tell them apart"
    assert seed.loaded.raw == seed.disk
    held = {spec.name for spec in seed.holding.announcement.manifest.tensors}
    assert {f"pooler.poolers_by_task[embed].head.projector.{name}" for name in ours} < held


def test_a_client_whose_folder_has_another_projector_ends_with_the_source_s(
    seed: Seed, models: ModelStore, tmp_path: Path, log_lines: LogLines
) -> None:
    other = models.get("embedder-other-dense")
    folder = with_dense_of(models.bare("embedder"), other, tmp_path / "client")
    with source_of(seed.holding) as source:
        pulled = pull(folder, source, arguments=EMBED)
    assert log_lines.one("rank 0: target: pulled ")
    assert pulled.raw == seed.disk
    assert projector(pulled.model) == projector(seed.loaded.model) != projector(by_default(other).model)


def test_a_client_without_the_projector_s_file_is_refused(
    seed: Seed, models: ModelStore, tmp_path: Path, log_lines: LogLines
) -> None:
    with source_of(seed.holding) as source, pytest.raises(RuntimeError, match="Cannot find any model weights"):
        pull(models.bare("embedder"), source, arguments=EMBED)
    line = log_lines.one("the default loader (auto) loads the target")
    assert "tensors differ from what the server holds" in line
    assert "head.projector.0.weight: it is not expected here" in line
    # With all other weight files: vLLM loads the folder itself, without a projector, and nothing was pulled.
    folder = shutil.copytree(models.get("embedder"), tmp_path / "no-dense")
    (folder / DENSE).unlink()
    with source_of(seed.holding) as source:
        assert projector(pull(folder, source, arguments=EMBED).model) == {}
    assert log_lines.with_part("the default loader (auto) loads the target: could not pull")


def test_a_source_without_the_projector_s_file_is_refused(
    models: ModelStore, tmp_path: Path, log_lines: LogLines
) -> None:
    folder = shutil.copytree(models.get("embedder"), tmp_path / "no-dense")
    (folder / DENSE).unlink()
    _, holding = offered(folder, {}, EMBED)
    log_lines.lines.clear()
    with source_of(holding) as source:
        pulled = pull(models.get("embedder"), source, arguments=EMBED)
    line = log_lines.one("the default loader (auto) loads the target: could not pull")
    assert "head.projector.0.weight: the server does not hold it" in line
    assert projector(pulled.model) == projector(by_default(models.get("embedder")).model)


def test_a_pull_that_breaks_leaves_the_client_with_its_own_projector(
    seed: Seed, models: ModelStore, log_lines: LogLines
) -> None:
    other = models.get("embedder-other-dense")
    # The block is corrupted after it was written. It holds the projector's bytes too.
    with source_of(seed.holding, Fault(FaultKind.CORRUPT, 0, times=None)) as source:
        loaded = pull(other, source, arguments=EMBED)
    assert log_lines.one("the default loader (auto) loads the target: could not pull")
    disk = by_default(other)
    assert loaded.raw == disk.raw
    assert projector(loaded.model) == projector(disk.model)


def test_an_embedder_without_a_projector_is_pulled_like_every_model(models: ModelStore, log_lines: LogLines) -> None:
    loaded, holding = offered(models.get("embedder-plain"), {}, EMBED)
    with source_of(holding) as source:
        pulled = pull(models.bare("embedder-plain"), source, arguments=EMBED)
    assert log_lines.one("rank 0: target: pulled ")
    assert pulled.raw == loaded.raw == by_default(models.get("embedder-plain")).raw


def test_a_reload_that_would_leave_the_projector_alone_is_refused(seed: Seed, models: ModelStore) -> None:
    folder = models.get("embedder")
    model = load(folder, arguments=EMBED).model
    why = "vLLM's own reload does not reach modules outside of the model's tree: "
    with source_of(seed.holding) as source:
        config = harness.engine_config(folder, load_format="netloader", extra=extra([source]), **EMBED)
        with pytest.raises(ReloadRefused, match=re.escape(f"{why}pooler.poolers_by_task[")):
            reload(model, config)
    assert projector(model) == projector(seed.loaded.model)


# --- tensors that a constructor reads and hides -----------------------------------------------------------------------


def _by_safe_open(path: Path) -> torch.Tensor:
    with safetensors.safe_open(path, framework="pt") as file:
        found: torch.Tensor = file.get_tensor("secret")
    return found


def _by_slice(path: Path) -> torch.Tensor:
    with safetensors.safe_open(path, framework="pt") as file:
        found: torch.Tensor = file.get_slice("secret")[:]
    return found


def _by_load_file(path: Path) -> torch.Tensor:
    found: torch.Tensor = safetensors.torch.load_file(path)["secret"]
    return found


def _by_load(path: Path) -> torch.Tensor:
    found: torch.Tensor = safetensors.torch.load(path.read_bytes())["secret"]
    return found


def _by_torch(path: Path) -> torch.Tensor:
    torch.save({"inner": [{"secret": _SECRET}]}, path.with_suffix(".pt"))
    found: torch.Tensor = torch.load(path.with_suffix(".pt"), weights_only=True)["inner"][0]["secret"]
    return found


_SECRET = torch.arange(12.0).reshape(3, 4)


@pytest.fixture
def hides(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], torch.Tensor]], None]:
    """Makes Llama's constructor read a tensor and keep it in a closure only."""
    from vllm.model_executor.models.llama import LlamaForCausalLM

    def install(read: Callable[[], torch.Tensor]) -> None:
        original = LlamaForCausalLM.__init__

        def built(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
            original(self, vllm_config=vllm_config, prefix=prefix)
            hidden = read() * 2
            self.scale_logits = lambda logits: logits * hidden.sum()

        monkeypatch.setattr(LlamaForCausalLM, "__init__", built)

    return install


@pytest.mark.parametrize("read", [_by_safe_open, _by_slice, _by_load_file, _by_load, _by_torch])
def test_what_a_constructor_reads_and_hides_is_refused_by_name(
    read: Callable[[Path], torch.Tensor],
    hides: Callable[[Callable[[], torch.Tensor]], None],
    seeds: Seeds,
    models: ModelStore,
    tmp_path: Path,
    log_lines: LogLines,
) -> None:
    path = tmp_path / "secret.safetensors"
    safetensors.torch.save_file({"secret": _SECRET}, path)
    honest = seeds.get("llama-bf16")
    before = safetensors.safe_open, safetensors.torch.load, torch.load
    hides(lambda: read(path))
    log_lines.lines.clear()
    # As a server: it serves nothing, and says why.
    load(models.get("llama-bf16"))
    line = log_lines.one("does not serve its target", NOT_NAMED)
    assert "secret" in line
    assert line.endswith("(load this model from storage)")
    server = serving.running_server()
    assert server is not None
    # As a client: of such a server, and of one whose model hides nothing.
    log_lines.lines.clear()
    with source_of(honest.holding) as source:
        assert pull(models.get("llama-bf16"), server.address, source).raw == honest.disk
    assert "secret" in log_lines.one("the default loader (auto) loads the target", NOT_NAMED)
    assert (safetensors.safe_open, safetensors.torch.load, torch.load) == before


def test_the_line_has_the_name_of_the_file(
    hides: Callable[[Callable[[], torch.Tensor]], None], models: ModelStore, tmp_path: Path, log_lines: LogLines
) -> None:
    path = tmp_path / "secret.safetensors"
    safetensors.torch.save_file({"secret": _SECRET}, path)
    hides(lambda: _by_load_file(path))
    load(models.get("llama-bf16"))
    assert f"{path}: secret" in log_lines.one("does not serve its target")


def test_a_server_that_hides_something_refuses_a_client_that_does_not(
    hides: Callable[[Callable[[], torch.Tensor]], None],
    models: ModelStore,
    tmp_path: Path,
    log_lines: LogLines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "secret.safetensors"
    safetensors.torch.save_file({"secret": _SECRET}, path)
    hides(lambda: _by_load_file(path))
    load(models.get("llama-bf16"))
    server = serving.running_server()
    assert server is not None
    monkeypatch.undo()
    log_lines.lines.clear()
    pull(models.get("llama-bf16"), server.address)
    assert log_lines.one("the default loader", "could not pull", NOT_NAMED)


def test_ordinary_models_have_no_unregistered_weights(seeds: Seeds) -> None:
    """The search beyond `named_modules` finds no further weights in ordinary models."""
    for kind in ("llama-bf16", "llama-tied", "llama-w8a8", "qwen3-moe"):
        settings = {"INT8_CACHE": "dram"} if kind == "llama-w8a8" else {}
        seed = seeds.get(kind, **settings)
        assert [spec.name for spec in seed.holding.announcement.manifest.tensors] == list(seed.disk)
        assert not any("[" in name for name in named_raw_tensors(seed.loaded.model))


# --- ordinary folders -------------------------------------------------------------------------------------------------

BESIDE = {
    ".gitattributes": "*.bin filter=lfs",
    "LICENSE": "",
    "README.md": "",
    "added_tokens.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": "{}",
    "preprocessor_config.json": "{}",
    "special_tokens_map.json": "{}",
    "training_args.bin": "",
}
"""What repositories have beside configuration, tokenizer and weights."""

CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "scales_own.py": "SCALE = 1.0",
    "modeling_own.py": """
from transformers import LlamaModel
from .configuration_own import OwnConfig
from .scales_own import SCALE

class OwnModel(LlamaModel):
    config_class = OwnConfig
    _supports_attention_backend = True
""",
}
"""A model whose code is in its folder. vLLM builds it by its Transformers backend."""


@pytest.mark.parametrize("code", [False, True], ids=["usual", "code of its own"])
def test_files_that_hold_no_weights_do_not_keep_a_model_from_being_served(
    code: bool, models: ModelStore, tmp_path: Path, log_lines: LogLines
) -> None:
    folder = shutil.copytree(models.get("llama-bf16"), tmp_path / "model")
    for name, text in {**BESIDE, **(CODE if code else {})}.items():
        (folder / name).write_text(text, encoding="utf-8")
    if code:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
        config |= {"model_type": "own", "architectures": ["OwnModelForCausalLM"], "auto_map": classes}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    load(folder, arguments={"trust_remote_code": code})
    assert log_lines.one("serves target")
    assert not log_lines.with_part("does not serve")
