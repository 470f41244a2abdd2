"""`serve models--me--tiny`, `serve me/tiny`: the snapshot is found, and the model has the name of its repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from netloader.checkpoint.cache import cache_folder, find_folder, model_name
from netloader.errors import CheckpointError
from tests.cases.files import save, tensors
from tests.commands import run, serving


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def snapshot(cache: Path, commit: str, *, main: bool = False) -> Path:
    repository = cache / "models--me--tiny"
    save(repository / "snapshots" / commit, "model.safetensors", tensors("a"))
    if main:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


def test_a_repository_id_is_served_from_the_cache_under_its_name(cache: Path) -> None:
    snapshot(cache, "0123abc")
    with serving("me/tiny") as server:
        assert f"serving me/tiny at {server.address}\n" in server.lines


def test_the_folder_of_a_repository_means_its_snapshot(cache: Path, tmp_path: Path) -> None:
    found = snapshot(cache, "0123abc")
    assert find_folder(cache / "models--me--tiny") == find_folder(Path("me/tiny")) == found
    assert model_name(found) == "me/tiny"
    link = tmp_path / "link"
    link.symlink_to(found)
    assert model_name(link) == "me/tiny"
    assert model_name(tmp_path / "llama") == "llama"


def test_the_snapshot_of_main_is_taken_and_without_it_several_are_named(cache: Path) -> None:
    first, second = snapshot(cache, "1"), snapshot(cache, "2")
    with pytest.raises(CheckpointError, match="2 snapshots") as caught:
        find_folder(Path("me/tiny"))
    assert str(first) in caught.value.hint
    snapshot(cache, "2", main=True)
    assert find_folder(Path("me/tiny")) == second


def test_an_id_that_is_not_in_the_cache_is_an_error_that_says_how_to_get_it(cache: Path) -> None:
    done = run("serve", "me/other")
    assert done.returncode == 2
    assert f"me/other does not exist, and is not a repository in the Hugging Face cache {cache}" in done.stderr
    assert "hf download me/other" in done.stderr


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/c", "HF_HOME": "/b"}, "/c"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({}, str(Path.home() / ".cache/huggingface/hub")),
    ],
)
def test_the_cache_is_where_huggingface_hub_puts_it(environment: dict[str, str], folder: str) -> None:
    assert cache_folder(environment) == Path(folder)
