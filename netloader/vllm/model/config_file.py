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

from netloader.vllm.model.plain_values import NotComparable, digest_of_plain

__all__ = ["digest_of_config"]

_NAMES = {"hf": "config.json", "mistral": "params.json"}
"""The file of each format."""

_WEIGHTS_OF_MISTRAL = "consolidated*.safetensors"
"""By such files vLLM tells a model whose configuration is in the format of Mistral."""

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


def digest_of_config(folder: Path | None, config_format: str = "auto", *, downloaded: bool = False) -> str:
    """A digest over the file in `folder` that vLLM reads; empty if there is none.

    Args:
        folder: The folder with the configuration of the model; None if there is none on this host.
        config_format: vLLM's ``--config-format``.
        downloaded: Whether vLLM was given a repository, of which the folder may have only some files.

    Raises:
        NotComparable: The file can't be read, or is not JSON.
    """
    files = [] if folder is None else [folder / name for name in _names(folder, config_format, downloaded=downloaded)]
    found = {}
    for file in files:
        try:
            found[file.name] = _kept(json.loads(file.read_bytes()))
        except (OSError, ValueError) as error:
            raise NotComparable(f"{file} can't be read: {error}") from error
    return digest_of_plain(found) if found else ""


def _names(folder: Path, config_format: str, *, downloaded: bool) -> list[str]:
    """The files that vLLM reads; both, if it can't be told which one."""
    there = [name for name in _NAMES.values() if (folder / name).is_file()]
    if config_format in _NAMES:
        return [name for name in there if name == _NAMES[config_format]]
    if config_format != "auto" or len(there) < len(_NAMES):
        return there
    # As vLLM chooses. Of a repository it asks the hub, so that a weight file that is not here shows nothing.
    if any(file.is_file() for file in folder.glob(_WEIGHTS_OF_MISTRAL)):
        return [_NAMES["mistral"]]
    return there if downloaded else [_NAMES["hf"]]


def _kept(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _kept(item) for key, item in value.items() if not _left_out(key)}
    return [_kept(item) for item in value] if isinstance(value, list) else value


def _left_out(key: str) -> bool:
    return key in _LEFT_OUT or key.endswith(_ENDINGS)
