"""Checks of the harness: equal loads have equal digests, and one changed weight changes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import ModelStore, change_weight
from tests.vllm import harness

pytestmark = pytest.mark.usefixtures("needs_vllm")

# One tensor per kind of layer.
CHANGES = {
    "llama-bf16": (
        "model.embed_tokens.weight",
        "model.layers.3.self_attn.k_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
        "lm_head.weight",
    ),
    "llama-w8a8": ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.gate_proj.weight_scale"),
    "qwen3-moe": (
        "model.layers.1.mlp.gate.weight",
        "model.layers.0.mlp.experts.5.down_proj.weight",
        "model.layers.1.mlp.experts.0.up_proj.weight",
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_loading_twice_gives_equal_raw_digests_and_a_changed_weight_does_not(
    kind: str, models: ModelStore, tmp_path: Path
) -> None:
    first = harness.load(harness.engine_config(models.get(kind))).raw
    assert len(first) > 10
    assert harness.load(harness.engine_config(models.get(kind))).raw == first
    for number, name in enumerate(CHANGES[kind]):
        folder = change_weight(models.get(kind), tmp_path / str(number), name)
        changed = harness.load(harness.engine_config(folder)).raw
        assert changed.keys() == first.keys()
        assert changed != first, f"changing {name} went unseen"


def test_a_draft_model_loads_beside_its_target(models: ModelStore) -> None:
    speculative = {"model": str(models.get("draft")), "method": "draft_model", "num_speculative_tokens": 3}
    config = harness.engine_config(models.get("llama-bf16"), speculative_config=speculative)
    target = harness.load(config)
    draft = harness.load(config, role="draft")
    assert len(draft.raw) < len(target.raw)
