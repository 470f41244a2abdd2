"""Whether input and output embeddings are one tensor: decided by weight files, which a client may not have."""

from __future__ import annotations

import logging
from typing import Any

from netloader.core.identity import ModelIdentity

__all__ = ["adopt_untied", "could_adopt", "tied_by_files"]

log = logging.getLogger(__name__)


def tied_by_files(model_config: Any) -> bool | None:
    """Whether this model is built with tied embeddings; None when its config says so and no weight file confirms it."""
    if not getattr(model_config.hf_config, "tie_word_embeddings", False):
        return False
    from vllm.transformers_utils import config

    # Older releases take the word of config.json, and never look.
    has_lm_head = getattr(config, "checkpoint_has_lm_head", None)
    if has_lm_head is None:
        return True
    known = has_lm_head(model_config.model, revision=model_config.revision)
    return None if known is None else True


def could_adopt(model_config: Any) -> bool:
    """Whether this vLLM takes back a config's claim of tied embeddings at all."""
    return hasattr(model_config, "word_embeddings_untied_by_checkpoint")


def adopt_untied(model_config: Any, source: ModelIdentity) -> bool:
    """Build the model with untied embeddings where the source's weight files made vLLM do so.

    Args:
        model_config: vLLM's configuration of a model that is not built yet, changed as vLLM itself changes it when it
            finds an output embedding in a weight file.
        source: What the source said.

    Returns:
        Whether anything was changed.
    """
    if source.tied is not False:
        return False
    model_config.hf_config.tie_word_embeddings = False
    model_config.hf_config.get_text_config().tie_word_embeddings = False
    model_config.word_embeddings_untied_by_checkpoint = True
    return True
