"""What is served after post-processing: live tensors where they are still raw, originals where they are not."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec
import torch

from netloader.errors import ManifestError
from netloader.tensors import Memory
from netloader.vllm.model.snapshot import Settled, same_bits

if TYPE_CHECKING:
    from netloader.codecs.block_view import BlockView
    from netloader.core.manifest import Manifest
    from netloader.core.plan import Plan
    from netloader.core.protocol.events import Announcement

__all__ = ["Offered", "offered"]

_Reference = weakref.ref[torch.Tensor]


@dataclass(frozen=True)
class Offered:
    """A holding that keeps originals alive, and nothing that vLLM may drop.

    Attributes:
        announcement: What is said about it.
        memory: Its blocks.
        settled: Owner of the originals.
    """

    announcement: Announcement
    memory: OfferedMemory
    settled: Settled

    @property
    def device(self) -> str:
        """Where it lives, as torch names it."""
        return self.memory.device

    def equal_to(self, tensor: torch.Tensor) -> _Reference | None:
        """One of its tensors that holds the same, weakly: the very memory that another model may come to share."""
        kept = [weakref.ref(tensor) for tensor in self.settled.kept.values()]
        for reference in [*kept, *self.settled.live.values()]:
            found = reference()
            if (
                found is not None
                and (found.dtype, found.shape, found.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
                and same_bits(found, tensor)
            ):
                return reference
        return None


class OfferedMemory:
    """The memory of an offered model, where a tensor of the same contents may stand in for one that vLLM dropped.

    Args:
        manifest: What the tensors look like.
        references: The tensors, weakly, in the order of the manifest.
        stand_ins: For some of them, by place, a tensor of the same contents in another model.
        device: Where all of them live, as torch names it.
    """

    def __init__(
        self, manifest: Manifest, references: list[_Reference], stand_ins: Mapping[int, _Reference], device: str
    ) -> None:
        self.device = device
        self._manifest = manifest
        self._references = references
        self._stand_ins = dict(stand_ins)
        self._lock = threading.Lock()
        self._memory = self._made()

    def views(self, plan: Plan, numbers: Sequence[int]) -> Sequence[BlockView]:
        """Views of these blocks, in this order.

        Raises:
            ManifestError: Some of the memory is gone, and nothing can stand in for it.
        """
        try:
            return self._memory.views(plan, numbers)
        except ManifestError:
            if not self._replace_dropped():
                raise
            return self._memory.views(plan, numbers)

    def missing(self, plan: Plan, numbers: Sequence[int]) -> dict[int, str]:
        """Those of these blocks that can't be read any more, with the reason."""
        missing = self._memory.missing(plan, numbers)
        return self._memory.missing(plan, numbers) if missing and self._replace_dropped() else missing

    def _replace_dropped(self) -> bool:
        with self._lock:
            dropped = [place for place in self._stand_ins if self._references[place]() is None]
            for place in dropped:
                # Used once: whether it still holds what it should is checked by the client, as for every tensor.
                self._references[place] = self._stand_ins.pop(place)
            if dropped:
                self._memory = self._made()
            return bool(dropped)

    def _made(self) -> Memory:
        found = [reference() for reference in self._references]
        # Dropped this very moment: an empty tensor stands for it, and the memory answers "gone".
        tensors = [torch.empty(0) if tensor is None else tensor for tensor in found]
        return Memory(self._manifest, tensors, torch.device(self.device), weak=True)


def offered(
    announcement: Announcement,
    device: str,
    settled: Settled,
    load: str,
    target: Offered | None = None,
) -> Offered:
    """Put the tensors of today under the announcement of load time.

    Args:
        announcement: Made at the end of loading.
        device: Where the tensors live, as torch names it.
        settled: Where each raw tensor is now; none is lost.
        load: Digest over the roots of all ranks.
        target: Another model, whose tensors vLLM may put in the place of equal ones of this model.
    """
    references: list[_Reference] = []
    stand_ins: dict[int, _Reference] = {}
    for place, spec in enumerate(announcement.manifest.tensors):
        live = settled.live.get(spec.name)
        references.append(weakref.ref(settled.kept[spec.name]) if live is None else live)
        tensor = None if live is None else live()
        equal = None if target is None or tensor is None else target.equal_to(tensor)
        if equal is not None:
            stand_ins[place] = equal
    memory = OfferedMemory(announcement.manifest, references, stand_ins, device)
    identity = msgspec.structs.replace(announcement.identity, load=load)
    return Offered(replace(announcement, identity=identity), memory, settled)
