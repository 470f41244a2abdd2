"""Repository ids, and paths of a Hugging Face cache: one normal form of a model's name."""

from __future__ import annotations

import pytest

from netloader.checkpoint.names import repo_id_of


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/c/models--org--tiny/snapshots/0123abc", "org/tiny"),
        ("/c/models--org--tiny/snapshots/0123abc/model.safetensors", "org/tiny"),
        ("/c/models--org--tiny/snapshots/0123abc/2_Dense/model.safetensors", "org/tiny"),
        ("/c/models--gpt2/snapshots/0123abc", "gpt2"),
        ("models--org--tiny/snapshots/0123abc/", "org/tiny"),
        ("/c/models--a--b/snapshots/1/models--org--tiny/snapshots/2", "org/tiny"),
        ("/c/models--org--tiny", ""),
        ("/c/models--org--tiny/blobs/0123abc", ""),
        ("/c/datasets--org--tiny/snapshots/0123abc", ""),
        ("/x/llama", ""),
        ("org/tiny", ""),
        ("", ""),
    ],
)
def test_the_repository_id_of_a_cached_snapshot_is_found_in_its_path(path: str, name: str) -> None:
    assert repo_id_of(path) == name
