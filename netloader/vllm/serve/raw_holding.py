"""The raw layout that is served after post-processing: live tensors, raw or computed from, and originals."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec
import torch

from netloader.errors import ManifestError
from netloader.tensors import ComputedMemory, Inverse, Scratch, TensorMemory
from netloader.vllm.model.snapshot import Located, same_bits

if TYPE_CHECKING:
    from netloader.codecs.block_view import BlockView
    from netloader.core.manifest import Manifest
    from netloader.core.plan import Plan
    from netloader.core.protocol.events import Announcement

__all__ = ["RawHolding", "raw_holding"]

_Reference = weakref.ref[torch.Tensor]


@dataclass(frozen=True)
class RawHolding:
    """A holding that keeps originals alive, but no live tensor, because vLLM may drop those.

    Attributes:
        announcement: Its announcement.
        memory: Its blocks.
        located: Where each raw tensor is; owns the originals.
    """

    announcement: Announcement
    memory: RawMemory
    located: Located

    @property
    def device(self) -> str:
        """The device of its tensors, as torch names it."""
        return self.memory.device

    def equal_to(self, tensor: torch.Tensor) -> _Reference | None:
        """A weak reference to one of its raw tensors that equals `tensor`; None when there is none."""
        kept = [weakref.ref(tensor) for tensor in self.located.kept.values()]
        live = [ref for name, ref in self.located.live.items() if name not in self.located.inverses]
        for reference in [*kept, *live]:
            found = reference()
            if (
                found is not None
                and (found.dtype, found.shape, found.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
                and same_bits(found, tensor)
            ):
                return reference
        return None


class RawMemory:
    """The memory of a raw holding. A tensor that vLLM dropped can be replaced by an equal tensor of another model.

    Args:
        manifest: Names, dtypes and shapes of the tensors.
        references: Weak references to the tensors, in the order of the manifest.
        substitutes: For some of them, by place in that order, an equal tensor of another model.
        device: The device of all tensors, as torch names it.
        inverses: For some of them, by place in that order, how the bytes are computed.
        scratch: The memory for that; None if none are computed.

    Attributes:
        call_bytes: The size from which on no further block is added to a call of a channel; None: the channel's own.
        scratch: The memory with which blocks are computed.
    """

    def __init__(
        self,
        manifest: Manifest,
        references: list[_Reference],
        substitutes: Mapping[int, _Reference],
        device: str,
        inverses: Mapping[int, Inverse] | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        self.device = device
        self._manifest = manifest
        self._references = references
        self._substitutes = dict(substitutes)
        self._inverses = dict(inverses or {})
        self.scratch = scratch or Scratch(torch.device("cpu"))
        self._lock = threading.Lock()
        self._memory = self._build()
        self.call_bytes = self._memory.call_bytes

    def views(self, plan: Plan, numbers: Sequence[int]) -> Sequence[BlockView]:
        """Views of these blocks, in this order.

        Raises:
            ManifestError: A tensor was dropped or moved, and there is no substitute.
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
            dropped = [place for place in self._substitutes if self._references[place]() is None]
            for place in dropped:
                # A substitute may have changed since. The client verifies its digest, as for every tensor.
                self._references[place] = self._substitutes.pop(place)
            if dropped:
                self._memory = self._build()
            return bool(dropped)

    def _build(self) -> ComputedMemory:
        found = [reference() for reference in self._references]
        # An empty tensor replaces one that was dropped in the meantime. Its blocks are then answered with "gone".
        tensors = [torch.empty(0) if tensor is None else tensor for tensor in found]
        in_place = TensorMemory(self._manifest, tensors, torch.device(self.device), weak=True)
        return ComputedMemory(in_place, self._inverses, self.scratch)


def raw_holding(
    announcement: Announcement,
    device: str,
    located: Located,
    load: str,
    target: RawHolding | None = None,
) -> RawHolding:
    """Combine the announcement that was made after loading with the tensors that hold its contents now.

    Args:
        announcement: Made at the end of loading.
        device: The device of the tensors, as torch names it.
        located: Where each raw tensor is now; none is lost.
        load: Digest over the roots of all ranks.
        target: The target of a draft model. vLLM may replace tensors of the draft by equal ones of the target.
    """
    references: list[_Reference] = []
    substitutes: dict[int, _Reference] = {}
    inverses: dict[int, Inverse] = {}
    for place, spec in enumerate(announcement.manifest.tensors):
        live = located.live.get(spec.name)
        references.append(weakref.ref(located.kept[spec.name]) if live is None else live)
        if spec.name in located.inverses:
            inverses[place] = located.inverses[spec.name]
            continue
        tensor = None if live is None else live()
        equal = None if target is None or tensor is None else target.equal_to(tensor)
        if equal is not None:
            substitutes[place] = equal
    memory = RawMemory(announcement.manifest, references, substitutes, device, inverses, located.scratch)
    identity = msgspec.structs.replace(announcement.identity, load=load)
    return RawHolding(replace(announcement, identity=identity), memory, located)
