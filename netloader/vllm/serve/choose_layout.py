"""What a worker serves once vLLM has made its weights ready: raw where that is exact, else processed, else nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netloader.config import Config
from netloader.core.identity import ModelIdentity
from netloader.vllm.model.processed import hold_processed
from netloader.vllm.serve.recording import Recorded
from netloader.vllm.serve.retention import hint_for, kept_text, named
from netloader.vllm.serve.serving import WorkerServer

if TYPE_CHECKING:
    import torch

__all__ = ["Settling"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settling:
    """The decision for one model.

    Attributes:
        server: Where it is served.
        config: Ours.
        rank: For the log.
        identity: The model's, with all that is known after loading.
        load: Digest over the roots of all ranks.
        shares: Whether it is a draft that shares tensors with its target.
        adopted: Whether its weights were pulled processed.
        refusal: Why there are no raw tensors, and what could be done.
    """

    server: WorkerServer
    config: Config
    rank: int
    identity: ModelIdentity
    load: str
    shares: bool
    adopted: bool
    refusal: tuple[str, str]

    def serve(self, model: torch.nn.Module, recorded: Recorded | None) -> None:
        """Serve what can be served exactly, or tell clients why nothing is.

        Args:
            model: Ready for use.
            recorded: Its raw tensors; None when raw tensors alone do not make this model.
        """
        if recorded is None:
            if not self.adopted:
                self._refuse(*self.refusal)
            else:
                self._offer_processed(model, {}, *self.refusal)
            return
        settled = recorded.raw.settle(model)
        if settled.lost:
            some = named(f"{name} ({reason})" for name, reason in settled.lost.items())
            hint = hint_for(settled.lost, recorded.quantised, self.config)
            sizes = {spec.name: spec.nbytes for spec in recorded.announcement.manifest.tensors}
            self._offer_processed(
                model, sizes, f"post-processing left {len(settled.lost)} raw tensors behind: {some}", hint
            )
            return
        from netloader.vllm.serve.raw_holding import Offered, offered

        target = self.server.serves("target") if self.shares else None
        target = target if isinstance(target, Offered) else None
        holding = offered(recorded.announcement, recorded.device, settled, self.load, target)
        kept = kept_text(settled)
        manifest = holding.announcement.manifest
        self.server.offer(
            holding,
            f"raw layout, {len(manifest.tensors)} tensors, {manifest.nbytes / 1e6:.1f} MB, "
            f"{kept}{', ' if kept else ''}root {holding.announcement.root}",
        )

    def _offer_processed(self, model: torch.nn.Module, sizes: Mapping[str, int], reason: str, hint: str) -> None:
        """Serve the processed layout, since the raw one can't be; refuse where that would not be exact either."""
        if self.shares:
            holding, why_not_processed = None, "a draft that shares tensors with its target is served raw only"
        else:
            holding, why_not_processed = hold_processed(model, self.identity, sizes)
        if holding is None:
            self._refuse(f"{reason}; its processed weights are not exact either: {why_not_processed}", hint)
            return
        manifest = holding.announcement.manifest
        self.server.offer(
            holding,
            f"processed layout, {len(manifest.tensors)} tensors, {manifest.nbytes / 1e6:.1f} MB, "
            f"root {holding.announcement.root}",
        )
        role = self.identity.role
        log.info("netloader: rank %d: %s: no raw layout: %s (%s)", self.rank, role, reason, hint)
        self.server.refuse(role, f"{reason}; the processed layout is held", hint, layouts=("raw",))

    def _refuse(self, reason: str, hint: str) -> None:
        role = self.identity.role
        log.warning("netloader: rank %d does not serve its %s: %s (%s)", self.rank, role, reason, hint)
        self.server.refuse(role, reason, hint)
