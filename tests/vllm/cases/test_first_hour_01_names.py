"""Names of models in vLLM: `--served-model-name`, repository ids and DRAFT_MODEL are compared, paths are not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from netloader import sync
from netloader.vllm.serve import serving
from tests.models import ModelStore
from tests.vllm import harness
from tests.vllm.pulls import LogLines, Seeds, extra, load, pull

pytestmark = pytest.mark.usefixtures("needs_vllm")

SERVED = {"served_model_name": "tiny"}
COMMIT = "a" * 40
DRAFT = {"method": "draft_model", "num_speculative_tokens": 3}


def served_at() -> str:
    server = serving.running_server()
    assert server is not None
    return server.address


def snapshot(home: Path, model: Path) -> Path:
    folder = home / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    shutil.copytree(model, folder)
    return folder


def test_the_commands_of_the_documents_work_with_a_bare_folder_on_one_host(seeds: Seeds, models: ModelStore) -> None:
    kept = load(models.get("llama-bf16"), arguments=SERVED, MODEL=None)
    pulled = pull(models.bare("llama-bf16"), served_at(), arguments=SERVED, MODEL=None, FALLBACK=False)
    assert pulled.raw == kept.raw == seeds.disk("llama-bf16")


def test_a_folder_without_any_name_is_refused_with_the_settings_that_help(
    models: ModelStore, log_lines: LogLines
) -> None:
    kept = load(models.get("llama-bf16"), MODEL=None)
    root = sync.probe(served_at()).announcement.root
    with pytest.raises(Exception, match="set MODEL to one name on both sides") as caught:
        pull(models.bare("llama-bf16"), served_at(), MODEL=None, FALLBACK=False)
    assert "EXPECT_ROOT on the client to the root" in str(caught.value)
    by_root = pull(models.bare("llama-bf16"), served_at(), MODEL=None, FALLBACK=False, EXPECT_ROOT=root)
    assert by_root.raw == kept.raw
    by_fingerprint = pull(models.get("llama-bf16"), served_at(), MODEL=None, FALLBACK=False)
    assert by_fingerprint.raw == kept.raw


def test_one_repository_in_two_caches_is_one_model(models: ModelStore, tmp_path: Path) -> None:
    kept = load(snapshot(tmp_path / "one", models.get("llama-bf16")), MODEL=None)
    assert sync.probe(served_at()).announcement.identity.names == {"repository": f"org/tiny@{COMMIT}"}
    bare = snapshot(tmp_path / "two", models.bare("llama-bf16"))
    assert pull(bare, served_at(), MODEL=None, FALLBACK=False).raw == kept.raw


def test_a_name_that_no_peer_accepts_is_not_served(models: ModelStore, log_lines: LogLines) -> None:
    load(models.get("llama-bf16"), arguments={"served_model_name": "m" * 100_000}, MODEL=None)
    line = log_lines.one("does not serve its target")
    assert "what a peer accepts" in line
    assert len(line) < 800


def config(draft: Path, **settings: Any) -> Any:
    folder = settings.pop("folder")
    speculative = {"speculative_config": {"model": str(draft), **DRAFT}}
    return harness.engine_config(folder, load_format="netloader", extra=settings, **speculative)


def test_a_draft_at_another_path_is_named_by_draft_model(models: ModelStore, seeds: Seeds, log_lines: LogLines) -> None:
    seed = config(models.get("draft"), folder=models.get("llama-bf16"), **extra(DRAFT_MODEL="small"))
    kept = harness.load(seed), harness.load(seed, role="draft")
    assert sync.probe(served_at(), role="draft").announcement.identity.names == {"MODEL": "small"}

    settings = {**extra([served_at()]), "SERVE": False, "FALLBACK": False}
    client = config(models.bare("draft"), folder=models.bare("llama-bf16"), DRAFT_MODEL="small", **settings)
    assert harness.load(client).raw == kept[0].raw
    assert harness.load(client, role="draft").raw == kept[1].raw == seeds.disk("draft")

    unnamed = config(models.bare("draft"), folder=models.bare("llama-bf16"), **settings)
    assert harness.load(unnamed).raw == kept[0].raw
    with pytest.raises(Exception, match="set DRAFT_MODEL to one name on both sides"):
        harness.load(unnamed, role="draft")
