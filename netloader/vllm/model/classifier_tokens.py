"""The tokens whose rows of the output head become the classifier of a model.

vLLM can make a classifier from a model that generates text (``method`` and ``classifier_from_token`` in the
configuration of the model): loading code copies rows of the output head into `score.weight`. Which rows, the tokenizer
decides, which is a setting of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from netloader.vllm.model.plain_values import NotComparable

__all__ = ["classifier_tokens_of"]


def classifier_tokens_of(model_config: Any) -> Mapping[str, int | None]:
    """The id of each token that the classifier is made from; empty for a model that has no such classifier.

    Raises:
        NotComparable: The tokenizer can't be loaded, or does not give the ids.
    """
    hf_config = model_config.hf_config
    configs = (hf_config, hf_config.get_text_config()) if hasattr(hf_config, "get_text_config") else (hf_config,)
    found = (str(token) for config in configs for token in getattr(config, "classifier_from_token", None) or ())
    tokens = list(dict.fromkeys(found))
    if not tokens:
        return {}

    from vllm.tokenizers import get_tokenizer

    # With the arguments of vLLM's loading code.
    name = model_config.tokenizer
    try:
        tokenizer = get_tokenizer(
            name,
            revision=model_config.tokenizer_revision,
            tokenizer_mode=model_config.tokenizer_mode,
            trust_remote_code=model_config.trust_remote_code,
        )
        return {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    except Exception as error:
        # Tokenizers raise anything, and code of a repository may run here.
        raise NotComparable(f"the tokenizer {name} does not give the ids of {tokens}: {error}") from error
