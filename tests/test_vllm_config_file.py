"""The digest of a model's configuration file: what may decide raw tensors counts, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from netloader.vllm.model.config_file import digest_of_config
from netloader.vllm.model.plain_values import NotComparable

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_attention_heads": 32,
    "text_config": {"hidden_size": 64, "rope_theta": 1e4, "layers": [{"kind": "a", "attention_dropout": 0.0}]},
}


def digest(folder: Path, config: Any, name: str = "config.json", config_format: str = "auto") -> str:
    (folder / name).write_text(json.dumps(config))
    return digest_of_config(folder, config_format)


@pytest.mark.parametrize(
    "more",
    [
        {"_name_or_path": "/a/path", "transformers_version": "5.0"},
        {"torch_dtype": "float16", "dtype": "float16", "architectures": ["X"], "tie_word_embeddings": True},
        {"quantization_config": {"bits": 4}},
        {"rope_parameters": {"rope_theta": 1.0}, "max_position_embeddings": 9, "sliding_window": 4},
        {"eos_token_id": [1, 2], "image_token_index": 3, "attention_dropout": 0.1, "use_cache": True},
        {"text_config": {**CONFIG["text_config"], "rope_theta": 5.0, "bos_token_id": 3}},
        {"text_config": {**CONFIG["text_config"], "layers": [{"kind": "a", "attention_dropout": 0.5}]}},
    ],
)
def test_what_decides_no_raw_tensor_is_left_out(more: dict[str, Any], tmp_path: Path) -> None:
    assert digest(tmp_path, CONFIG | more) == digest(tmp_path, CONFIG) != ""


@pytest.mark.parametrize(
    "more",
    [
        {"num_attention_heads": 16},
        {"nobody_knows": None},
        {"text_config": {**CONFIG["text_config"], "hidden_size": 65}},
        {"text_config": {**CONFIG["text_config"], "layers": [{"kind": "b"}]}},
    ],
)
def test_everything_else_counts(more: dict[str, Any], tmp_path: Path) -> None:
    assert digest(tmp_path, CONFIG | more) != digest(tmp_path, CONFIG)


def test_the_order_of_keys_does_not_matter(tmp_path: Path) -> None:
    assert digest(tmp_path, dict(reversed(CONFIG.items()))) == digest(tmp_path, CONFIG)


def test_the_file_of_the_format_that_vllm_reads_counts(tmp_path: Path) -> None:
    alone = digest(tmp_path, {"dim": 4}, "params.json")
    assert alone not in ("", digest(tmp_path, {"dim": 5}, "params.json"))
    (tmp_path / "params.json").unlink()
    one = digest(tmp_path, CONFIG)
    assert one == digest_of_config(tmp_path, "hf") == digest_of_config(tmp_path, "auto", downloaded=True)
    assert one != digest(tmp_path, CONFIG | {"a": 1}) != alone
    digest(tmp_path, CONFIG)
    digest(tmp_path, {"dim": 4}, "params.json")
    assert digest_of_config(tmp_path, "mistral") == alone
    assert digest_of_config(tmp_path, "hf") == digest_of_config(tmp_path) == one
    (tmp_path / "consolidated-00001-of-00002.safetensors").touch()
    assert digest_of_config(tmp_path) == alone, "vLLM takes the format of Mistral for such weight files"
    assert digest_of_config(tmp_path, downloaded=True) == alone


@pytest.mark.parametrize(("config_format", "downloaded"), [("auto", True), ("of_a_plugin", False)])
def test_both_files_count_if_it_can_not_be_told_which_one_vllm_reads(
    config_format: str, downloaded: bool, tmp_path: Path
) -> None:
    """vLLM asks the hub for the weight files of a repository; a snapshot may have only some."""

    def found(name: str, config: Any) -> str:
        (tmp_path / name).write_text(json.dumps(config))
        return digest_of_config(tmp_path, config_format, downloaded=downloaded)

    found("config.json", CONFIG)
    texts = {found("params.json", {"dim": 4}), found("params.json", {"dim": 5}), found("config.json", {})}
    assert len(texts) == 3


def test_without_a_file_nothing_is_stated(tmp_path: Path) -> None:
    assert digest_of_config(None) == digest_of_config(tmp_path) == digest_of_config(tmp_path / "model.gguf") == ""
    digest(tmp_path, CONFIG)
    assert digest_of_config(tmp_path, "mistral") == ""


def test_a_file_that_can_not_be_read_is_not_comparable(tmp_path: Path) -> None:
    """It may differ from that of a peer, so it does not count as one that is missing."""
    (tmp_path / "config.json").write_text("no json")
    with pytest.raises(NotComparable, match=r"config\.json can't be read"):
        digest_of_config(tmp_path)
