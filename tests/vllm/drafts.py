"""Targets that are loaded with a draft model, and the sharing of tensors between the two by vLLM."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.vllm import harness

_EMBEDDINGS = frozenset({"model.embed_tokens.weight"})


@dataclass(frozen=True)
class Kind:
    """A kind of draft.

    Attributes:
        target, draft: Kinds of models; no draft if it is in the target's own files.
        method: vLLM's name of the speculative method.
        unfilled: Names of tensors that its loading does not fill.
        state: Attributes that its loading sets.
    """

    target: str
    draft: str | None
    method: str
    unfilled: frozenset[str]
    state: Mapping[str, bool]

    def speculative(self, find: Callable[[str], Path]) -> dict[str, Any]:
        """The speculative configuration, where `find` gives the folder of a kind of model."""
        model = {} if self.draft is None else {"model": str(find(self.draft))}
        return {"method": self.method, **model, "num_speculative_tokens": 1}


def _eagle(draft: str, method: str, *, embeddings: bool, head: bool) -> Kind:
    state = {"has_own_embed_tokens": embeddings, "has_own_lm_head": head}
    return Kind("llama-bf16", draft, method, frozenset() if embeddings else _EMBEDDINGS, state)


KINDS: Mapping[str, Kind] = {
    "EAGLE": _eagle("eagle", "eagle", embeddings=False, head=False),
    "EAGLE with other embeddings": _eagle("eagle-own", "eagle", embeddings=True, head=False),
    "EAGLE with the target's embeddings": _eagle("eagle-equal", "eagle", embeddings=True, head=False),
    "EAGLE-3": _eagle("eagle3", "eagle3", embeddings=False, head=True),
    "MTP": Kind("mimo", None, "mtp", frozenset(), {}),
}


@dataclass
class Pair:
    """A target and its draft, loaded with one configuration."""

    config: Any
    target: harness.Loaded
    draft: harness.Loaded

    def share(self) -> None:
        """Have vLLM's proposer share the target's tensors, and free the draft's own ones."""
        harness.share_with_target(self.config, self.draft.model, self.target.model)
        gc.collect()

    def filled(self, kind: Kind) -> dict[str, str]:
        """Digests of the draft's tensors after loading, without those that it does not fill."""
        return {name: digest for name, digest in self.draft.raw.items() if name not in kind.unfilled}


def load_pair(
    target: Path,
    speculative: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
    *,
    draft: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Pair:
    """Load a target and its draft.

    Args:
        target: Folder of the target.
        speculative: vLLM's speculative configuration.
        settings: Of this library's loader; None for vLLM's own.
        draft: Of this library's loader for the draft, where they differ.
        arguments: More engine arguments.
    """

    def configuration(extra: Mapping[str, Any] | None) -> Any:
        how: dict[str, Any] = {} if extra is None else {"load_format": "netloader", "extra": extra}
        return harness.engine_config(target, speculative_config=dict(speculative), **how, **(arguments or {}))

    config = configuration(settings)
    loaded = harness.load(config)
    if draft is not None:
        config = configuration(draft)
    return Pair(config, loaded, harness.load(config, role="draft"))
