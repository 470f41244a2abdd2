"""Whether input and output embeddings are one tensor. Weight files decide that, and a client may have none."""

from __future__ import annotations

import logging
from typing import Any

from netloader.core.identity import ModelIdentity

__all__ = ["adopt_untied", "could_adopt", "tied_by_files"]

log = logging.getLogger(__name__)


def tied_by_files(model_config: Any) -> bool | None:
    """Whether this model is built with tied embeddings; None if only its config says so and no weight file is here."""
    if not getattr(model_config.hf_config, "tie_word_embeddings", False):
        return False
    from vllm.transformers_utils import config

    # Older releases use config.json alone, and do not look into the weight files.
    has_lm_head = getattr(config, "checkpoint_has_lm_head", None)
    if has_lm_head is None:
        return True
    known = has_lm_head(model_config.model, revision=model_config.revision)
    return None if known is None else True


def could_adopt(model_config: Any) -> bool:
    """Whether this vLLM unties embeddings that config.json calls tied, if the weight files have an output embedding."""
    return hasattr(model_config, "word_embeddings_untied_by_checkpoint")


def adopt_untied(model_config: Any, source: ModelIdentity) -> bool:
    """Have the model built with untied embeddings if the source's embeddings are untied.

    Args:
        model_config: vLLM's configuration of a model that is not built yet. It is changed in the way in which vLLM
            changes it when a weight file has an output embedding.
        source: The identity that the source announced.

    Returns:
        Whether anything was changed.
    """
    if source.tied is not False:
        return False
    text_config = model_config.hf_config.get_text_config()  # first, because an error must leave the configuration as is
    model_config.hf_config.tie_word_embeddings = False
    text_config.tie_word_embeddings = False
    model_config.word_embeddings_untied_by_checkpoint = True
    return True
