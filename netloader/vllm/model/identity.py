"""The identity of a model that vLLM is about to load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from netloader.checkpoint import fingerprint_of
from netloader.checkpoint.names import repo_id_of
from netloader.core.identity import MODEL, REPOSITORY, SERVED, ModelIdentity, Role
from netloader.vllm.model.folders import downloaded, folder_of
from netloader.vllm.model.quantisation import quantisation_of
from netloader.vllm.model.release import release_of_engine
from netloader.vllm.model.settings import Settings
from netloader.vllm.model.topology import Topology

__all__ = ["fingerprint_of_model", "identity_of", "names_of", "role_of"]

_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_STARTS_OF_PATHS = ("/", "./", "../", "~")
_URL = "://"


def role_of(model_config: Any) -> Role:
    """Whether the model is the target or the draft of speculative decoding."""
    return "draft" if getattr(model_config, "runner_type", "") == "draft" else "target"


def fingerprint_of_model(model_config: Any) -> str:
    """Fingerprint of the model's files; empty when there are none on this host (yet)."""
    path = folder_of(model_config)
    return "" if path is None else fingerprint_of(path)


def names_of(model_config: Any, *, given: str | None, served: str | None) -> dict[str, str]:
    """The names of a model, by where each comes from. A path is no name: it says nothing about another host.

    Args:
        model_config: vLLM's configuration of the model.
        given: MODEL of the configuration, for a draft DRAFT_MODEL; None if it was left out.
        served: vLLM's ``served_model_name``, if it is the name of this model. vLLM puts the text of ``--model`` there
            if none was given, so that text does not count.
    """
    weights = str(getattr(model_config, "model_weights", "") or "")  # a URL; `model` is then a folder of its own
    texts = (str(model_config.model), weights)
    of_user = "" if served is None or served in texts or _is_path(served) or _URL in served else served
    found = {MODEL: given or "", SERVED: of_user, REPOSITORY: _repository(model_config, weights)}
    return {origin: normal for origin, name in found.items() if (normal := name.rstrip("/"))}


def _is_path(text: str) -> bool:
    return text.startswith(_STARTS_OF_PATHS)


def _repository(model_config: Any, weights: str) -> str:
    """The repository id of a model on a hub, with its commit if that is known; or the URL of its weights."""
    if _URL in weights:
        return "" if "@" in weights else weights  # user and password of a URL belong to nobody else
    text = str(model_config.model)
    path = Path(text)
    if path.exists():
        # vLLM rewrites the id of a downloaded model to the path of its snapshot. A part of a snapshot is another model.
        folders = [folder for folder in (path, path.resolve()) if folder.parent.name == "snapshots"]
        return next((f"{name}@{folder.name}" for folder in folders if (name := repo_id_of(folder))), "")
    if _is_path(text) or not _REPO_ID.fullmatch(text):
        return ""
    folder = downloaded(text, model_config.revision)
    return text if folder is None else f"{text}@{folder.name}"


def identity_of(
    model_config: Any,
    topology: Topology,
    *,
    name: str | None,
    served: str | None = None,
    tied: bool | None,
    settings: Settings,
    cache_config: Any = None,
    load_config: Any = None,
) -> ModelIdentity:
    """The identity of a model: everything that must match before tensors are sent.

    Args:
        model_config: vLLM's configuration of the model.
        topology: This worker's place in its engine.
        name: MODEL of the configuration, if it is the name of this model, or DRAFT_MODEL; None if there is none.
        served: vLLM's ``served_model_name``, if it is the name of this model.
        tied: Whether the embeddings are tied; None when it is not known.
        settings: What else in the configuration decides the tensors.
        cache_config: vLLM's configuration of its KV cache. Its dtype may decide which scales a model has.
        load_config: How vLLM was told to load.
    """
    role = role_of(model_config)
    quantisation = quantisation_of(model_config, cache_config, load_config, folder_of(model_config))
    return ModelIdentity(
        # A peer of protocol 1 compares this text, and made it in the same way.
        model=str(model_config.model) if name is None else name,
        names=names_of(model_config, given=name, served=served),
        architecture=str(model_config.architecture),
        revision=str(model_config.revision or ""),
        dtype=str(model_config.dtype).removeprefix("torch."),
        quantization=str(model_config.quantization or ""),
        quantization_config=quantisation.text,
        layout="raw",
        role=role,
        tp_size=topology.tp_size,
        tp_rank=topology.tp_rank,
        pp_size=topology.pp_size,
        pp_rank=topology.pp_rank,
        ep_size=topology.ep_size,
        ep_rank=topology.ep_rank,
        expert_placement=topology.experts,
        tied=tied,
        engine=str(release_of_engine()),
        settings={**settings.weights, **quantisation.settings},
        processed_settings=dict(settings.processed),
    )
