"""Which tensors of a draft are left out: those that loading does not fill and vLLM's proposer replaces."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloader.vllm.load.drafts import left_out, named_like_target, shares_with_target

EMBEDDINGS = ["model.embed_tokens.weight", "model.embed_tokens.weight_scale"]
HEAD = ["lm_head.weight", "model.layers.61.shared_head.head.weight"]
OTHERS = [
    "model.fc.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.61.shared_head.norm.weight",
    "model.layers.0.embed_tokens.weight",
    "model.lm_head.weight",
    "embed_tokens.weight",
    "draft_id_to_target_id",
]
FLAG = st.sampled_from([True, False, None])


@given(
    names=st.sets(st.sampled_from([*EMBEDDINGS, *HEAD, *OTHERS])),
    embeddings=FLAG,
    head=FLAG,
    pp=st.sampled_from([1, 2]),
)
def test_only_tensors_that_loading_does_not_fill_are_left_out(
    names: set[str], embeddings: bool | None, head: bool | None, pp: int
) -> None:
    said = {"has_own_embed_tokens": embeddings, "has_own_lm_head": head}
    state = {name: value for name, value in said.items() if value is not None}
    expected = set()
    if embeddings is False and pp == 1:
        expected |= names & set(EMBEDDINGS)
    if head is False:
        expected |= names & set(HEAD)
    assert left_out(names, state, pp_size=pp) == expected


def speculative(method: str) -> Any:
    """The part of vLLM's configuration that is read."""
    target = SimpleNamespace(model="/models/a")
    return SimpleNamespace(
        speculative_config=SimpleNamespace(use_eagle=lambda: method != "draft_model", target_model_config=target)
    )


@pytest.mark.parametrize(
    ("config", "role", "shares"),
    [
        (speculative("eagle"), "draft", True),
        (speculative("eagle"), "target", False),
        (speculative("draft_model"), "draft", False),
        (SimpleNamespace(speculative_config=None), "target", False),
    ],
)
def test_which_models_share(config: Any, role: Any, shares: bool) -> None:
    assert shares_with_target(config, role) is shares


@pytest.mark.parametrize(
    ("model", "role", "named"),
    [
        ("/models/a", "target", True),
        ("/models/b", "target", True),
        ("/models/a", "draft", True),
        ("/models/b", "draft", False),
    ],
)
def test_which_models_are_named_by_model(model: str, role: Any, named: bool) -> None:
    assert named_like_target(speculative("mtp"), SimpleNamespace(model=model), role) is named
