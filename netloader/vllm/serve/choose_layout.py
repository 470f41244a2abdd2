"""Choose the layout to serve after post-processing: raw if it is exact, else processed if that is exact, else none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from netloader.config import Config
from netloader.core.identity import Role
from netloader.session.holding import Holding
from netloader.vllm.model.load_state import load_state_of
from netloader.vllm.model.processed import hold_processed
from netloader.vllm.serve.recording import Recorded, Snapshot
from netloader.vllm.serve.retention import hint_for, kept_text, named

if TYPE_CHECKING:
    import torch

__all__ = ["Choice", "choose_layout"]


@dataclass(frozen=True)
class Choice:
    """What is served of a model.

    Attributes:
        role: Whether it is the target or its draft.
        holding: What is offered, in one layout; None when no layout is exact.
        detail: Description of the holding, for the log.
        refusal: Why the raw layout is not served, and a hint; empty when it is served.
    """

    role: Role
    holding: Holding | None = None
    detail: str = ""
    refusal: tuple[str, str] = ("", "")


def choose_layout(snapshot: Snapshot, model: torch.nn.Module, config: Config, target: Holding | None = None) -> Choice:
    """Decide what is served of a model.

    Args:
        snapshot: What was recorded when its loading ended.
        model: The post-processed model. Originals that are not needed any more are freed.
        config: netloader's configuration.
        target: What is served of the target, for a draft that shares tensors with it.
    """
    recorded = snapshot.record.recorded
    if recorded is not None:
        return _raw(snapshot, recorded, model, config, target)
    if snapshot.processed:
        return _processed(snapshot, model, {}, snapshot.record.refusal)
    return Choice(snapshot.role, refusal=snapshot.record.refusal)


def _raw(
    snapshot: Snapshot, recorded: Recorded, model: torch.nn.Module, config: Config, target: Holding | None
) -> Choice:
    from netloader.vllm.serve.raw_holding import RawHolding, raw_holding

    located = recorded.raw.locate(model)
    if located.lost:
        some = named(f"{name} ({reason})" for name, reason in located.lost.items())
        hint = hint_for(located.lost, recorded.quantised, config)
        sizes = {spec.name: spec.nbytes for spec in recorded.announcement.manifest.tensors}
        reason = f"post-processing left {len(located.lost)} raw tensors behind: {some}"
        return _processed(snapshot, model, sizes, (reason, hint))
    of_target = target if snapshot.shares and isinstance(target, RawHolding) else None
    holding = raw_holding(recorded.announcement, recorded.device, located, snapshot.load, of_target)
    kept = kept_text(located)
    manifest = holding.announcement.manifest
    detail = (
        f"raw layout, {len(manifest.tensors)} tensors, {manifest.nbytes / 1e6:.1f} MB, "
        f"{kept}{', ' if kept else ''}root {holding.announcement.root}"
    )
    return Choice(snapshot.role, holding, detail)


def _processed(
    snapshot: Snapshot, model: torch.nn.Module, sizes: Mapping[str, int], refusal: tuple[str, str]
) -> Choice:
    """The processed layout, for a model whose raw layout can't be served; nothing if it is not exact either."""
    holding: Holding | None = None
    why_not = "it is not known what this model is"
    if snapshot.shares:
        why_not = "a draft that shares tensors with its target is served raw only"
    elif snapshot.identity is not None:
        identity = msgspec.structs.replace(snapshot.identity, load_state=load_state_of(model))
        holding, why_not = hold_processed(model, identity, sizes)
    if holding is None:
        reason, hint = refusal
        return Choice(snapshot.role, refusal=(f"{reason}; its processed weights are not exact either: {why_not}", hint))
    manifest = holding.announcement.manifest
    detail = (
        f"processed layout, {len(manifest.tensors)} tensors, {manifest.nbytes / 1e6:.1f} MB, "
        f"root {holding.announcement.root}"
    )
    return Choice(snapshot.role, holding, detail, refusal)
