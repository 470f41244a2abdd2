"""A digest over the configuration file of a model (`config.json`), as far as it may decide values of raw tensors.

Raw tensors have the names and shapes that their list says, but their values may depend on more: loading code may
arrange the rows of a weight by the number of heads. The file is read, and not vLLM's object, because that object has
defaults of the installed packages, and changes while the model is built.

Left out are keys that decide no raw tensor: about positions, special tokens, generation and training, who wrote the
file, and what other fields of the identity compare. A key that is not known to be one of these counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from netloader.vllm.model.plain_values import digest_of_plain

__all__ = ["digest_of_config"]

_NAMES = {"hf": "config.json", "mistral": "params.json"}
"""The file of each format."""

_LEFT_OUT = frozenset(
    (
        # who wrote the file, and where the model was
        *("_name_or_path", "_commit_hash", "transformers_version", "auto_map"),
        # compared by other fields of the identity: dtype, architecture, quantization_config, tied
        *("dtype", "torch_dtype", "architectures", "quantization_config", "compression_config", "tie_word_embeddings"),
        # positions: their tables are no raw tensors
        *("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "max_position_embeddings"),
        *("model_max_length", "sliding_window", "use_sliding_window", "max_window_layers"),
        # how answers are generated, and their labels
        *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id"),
        *("max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "num_beams", "repetition_penalty"),
        # training
        *("initializer_range", "initializer_factor", "output_router_logits", "router_aux_loss_coef", "pretraining_tp"),
    )
)
_ENDINGS = ("_token_id", "_token_ids", "_token_index", "_dropout", "_dropout_prob", "dropout", "_pdrop")


def digest_of_config(folder: Path | None, config_format: str = "auto") -> str:
    """A digest over the file in `folder`; empty if there is none, or one that is not JSON.

    Args:
        folder: The folder with the configuration of the model; None if there is none on this host.
        config_format: vLLM's ``--config-format``. If that leaves the choice to vLLM, the files of all formats count.
    """
    names = [_NAMES[config_format]] if config_format in _NAMES else _NAMES.values()
    files = [] if folder is None else [folder / name for name in names if (folder / name).is_file()]
    try:
        found = {file.name: _kept(json.loads(file.read_bytes())) for file in files}
    except (OSError, ValueError):
        return ""  # vLLM reports it
    return digest_of_plain(found) if found else ""


def _kept(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _kept(item) for key, item in value.items() if not _left_out(key)}
    return [_kept(item) for item in value] if isinstance(value, list) else value


def _left_out(key: str) -> bool:
    return key in _LEFT_OUT or key.endswith(_ENDINGS)
