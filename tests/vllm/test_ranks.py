"""Several ranks of one engine: each pulls its own shard, and all keep the pulled weights, or none does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models import ModelStore
from tests.vllm import harness
from tests.vllm.releases import KNOWS_PROCESSED

TASKS = "tests.vllm.rank_tasks"


def folders(models: ModelStore, kind: str = "llama-bf16", other: str = "llama-bf16-other") -> dict[str, str]:
    return {
        "full": str(models.get(kind)),
        "bare": str(models.bare(kind)),
        "other": str(models.get(other)),
        "draft": str(models.get("draft")),
    }


def run(
    task: str, parallel: str, arguments: dict[str, Any], *, tasks: str = TASKS, **more: Any
) -> list[harness.RankResult]:
    arguments = {"arguments": {f"{parallel}_parallel_size": 2, **more}, **arguments}
    sizes: dict[str, Any] = {f"{parallel}_parallel": 2}
    return harness.run_ranks(f"{tasks}:{task}", [arguments, arguments], **sizes)


MOE = ("qwen3-moe", "qwen3-moe-other")


@pytest.mark.parametrize(
    ("parallel", "kinds", "more"),
    [
        pytest.param("tensor", (), {}, id="tensor"),
        pytest.param("pipeline", (), {}, id="pipeline", marks=pytest.mark.slow),
        pytest.param("tensor", MOE, {"enable_expert_parallel": True}, id="expert", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_pull_their_shards_and_agree(
    parallel: str, kinds: tuple[str, ...], more: dict[str, Any], models: ModelStore, tmp_path: Path
) -> None:
    task = {"models": folders(models, *kinds), "prefix": str(tmp_path / "rank-")}
    results = run("stories", parallel, task, **more)
    assert [result.returncode for result in results] == [0, 0], "\n".join(result.output for result in results)
    first, second = (result.value for result in results)

    # In each case, both ranks have the weights of a disk load.
    for seen, result in ((first, results[0]), (second, results[1])):
        assert [what for what, (right, _) in seen.items() if not right] == [], result.output

    assert first["all pull"][1] == second["all pull"][1] == ""

    assert "what was pulled is not kept: rank 1 could not pull" in first["one is refused"][1]
    assert "the identities differ: model is" in second["one is refused"][1]

    assert first["one has no source"][1] == ""
    assert second["one has no source"][1].endswith("SOURCE omitted")

    assert "rank 1 could not pull" in first["other checkpoint"][1]
    assert "the identities differ: fingerprint is" in second["other checkpoint"][1]

    for seen in (first, second):
        assert "the ranks have weights of different loads (load" in seen["other weights"][1]
        assert "nothing shows that all ranks have weights of one model" in seen["no proof"][1]

    assert "what was pulled is not kept: rank 1 loaded other weights" in first["a mixture"][1]
    assert second["a mixture"][1].endswith("SOURCE omitted")

    assert first["recording fails"][1] == ""
    assert "does not serve its target" in second["recording fails"][1]

    assert "rank 1 could not pull" in first["no fallback"][1]
    assert "the identities differ" in second["no fallback"][1]

    assert first["address file"][1] != second["address file"][1]
    assert first["next generation"][1] == second["next generation"][1] == ""
    assert first["load"][1] == second["load"][1] != ""
    assert first["shard"] != second["shard"], "the ranks hold different tensors"
    placements = {first["placement"][1], second["placement"][1]}
    if more.get("enable_expert_parallel"):
        assert len(placements) == 2, "each rank has a map of its own"
        assert all(text.startswith("linear, maps ") for text in placements)
    else:
        assert placements == {""}
    if parallel == "pipeline":
        assert second["draft"][1].endswith("loads the draft: SOURCE omitted")


def test_ranks_agree_about_target_and_draft_separately(models: ModelStore) -> None:
    task = {"models": {**folders(models), "eagle": str(models.get("eagle"))}}
    results = run("drafts", "tensor", task)
    assert [result.returncode for result in results] == [0, 0], "\n".join(result.output for result in results)
    first, second = (result.value for result in results)
    for seen, result in ((first, results[0]), (second, results[1])):
        assert [what for what, story in seen.items() if not story["right"]] == [], result.output
        assert {what: story["pulled"] for what, story in seen.items()} == {
            "both": ["target", "draft"],
            "draft refused": ["target"],
            "target refused": ["draft"],
        }
    for role in ("draft", "target"):
        reason = first[f"{role} refused"]["reason"]
        assert f"loads the {role}: what was pulled is not kept: rank 1 could not pull" in reason
        assert f"loads the {role}: could not pull" in second[f"{role} refused"]["reason"]


@pytest.mark.skipif(not KNOWS_PROCESSED, reason="this vLLM does not know processed weights")
def test_processed_weights_of_two_ranks_are_taken_by_both_or_by_none(models: ModelStore) -> None:
    """With tied weights and aliases. If the structure of one rank differs from its source, both ranks fall back."""
    kind = "processed-tied"
    task = {"models": {"full": str(models.get(kind)), "bare": str(models.bare(kind))}}
    results = run("processed", "tensor", task)
    assert [result.returncode for result in results] == [0, 0], "\n".join(result.output for result in results)
    first, second = (result.value for result in results)
    for seen, result in ((first, results[0]), (second, results[1])):
        assert seen["layout"] == "processed"
        assert seen["shared"]["lm_head.weight"] == "model.embed_tokens.weight"
        layer = "model.layers.0.mlp.down_proj"
        assert seen["shared"][f"{layer}.helper.same_scale"] == f"{layer}.scale"
        stories = {story: seen[story][0] for story in ("all pull", "wide", "number")}
        assert stories == {"all pull": True, "wide": True, "number": True}, result.output
        assert seen["all pull"][1] == ""
    assert first["digests"] != second["digests"], "the ranks hold different tensors"
    reasons = {
        "wide": "helper.row_sums: dtype is 'float64' here and 'float32' at the server",
        "number": "plain values differ from the source's and are not recomputed",
    }
    for broken, reason in reasons.items():
        line = second[broken][1]
        assert "loads the target: could not pull: processed weights: " in line
        assert reason in line
        assert "what was pulled is not kept: rank 1 could not pull: processed weights: " in first[broken][1]


def test_two_ranks_of_a_live_engine_reload_together_or_not_at_all(models: ModelStore) -> None:
    results = run("reloads", "tensor", {"models": folders(models)}, tasks="tests.vllm.rank_reloads")
    assert [result.returncode for result in results] == [0, 0], "\n".join(result.output for result in results)
    first, second = (result.value for result in results)
    for seen, result in ((first, results[0]), (second, results[1])):
        for story in ("one source is broken", "one source has other weights", "one rank wants other weights"):
            told = seen[story]
            assert (told["unchanged"], told["whole"]) == (True, False), f"{story}\n{result.output}"
            assert "the weights stay as they are" in told["reason"]
        assert "rank 1 could not pull" in seen["one source is broken"]["reason"]
        assert "rank 1 could not pull" in seen["one source has other weights"]["reason"]
        assert "the ranks have weights of different loads" in seen["one rank wants other weights"]["reason"]

        assert seen["both reload"] == {"reason": "", "unchanged": False, "whole": True}, result.output
        assert seen["both take other weights"] == {"reason": "", "unchanged": False, "whole": False}, result.output
        for story in ("both serve", "both have them", "both serve them"):
            assert seen[story]["right"], f"{story}\n{result.output}"


@pytest.mark.parametrize("where", ["pull", pytest.param("default load", marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_the_load_of_the_others(where: str, models: ModelStore) -> None:
    first, second = run("one_dies", "tensor", {"models": folders(models), "where": where})
    assert second.returncode == -9, second.output
    assert first.value is not None, first.output
    assert "did not report how their load went" in first.value["error"]
    assert first.value["seconds"] < 30, "the other ranks notice the death at once"
