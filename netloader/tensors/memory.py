"""The memory of one set of tensors, seen as blocks."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from operator import add, lt
from typing import NamedTuple

import torch

from netloader.codecs.npu_formats import is_private
from netloader.codecs.regions import Regions, regions_over
from netloader.core.manifest import Manifest
from netloader.core.plan import Block, Plan, in_groups
from netloader.errors import ManifestError, TransportUnavailable
from netloader.tensors.private import PlainCopies, PlainCopy

__all__ = ["BATCH_TENSORS", "MemoryBlock", "TensorMemory"]

BATCH_TENSORS = 512
"""Tensors per batch. All properties of a batch are read before the next batch, while its Python objects are in the CPU
caches (docs/decisions/0037-one-look.md)."""

_WINDOW = ctypes.c_uint8 * (1 << 62)
"""An array type over the whole address space. Slicing a block's spans from one such array makes one object per span. An
array for each span would make five objects, and tens of thousands of spans would trigger full garbage collections."""


class _Placement(NamedTuple):
    """Where the spans of a block are in memory.

    Attributes:
        storages: The storage of each span.
        sizes: Bytes of each storage.
        begins: Address of the first byte of each span.
        regions: The spans by address, if the memory is CPU memory and the placement is cached; None otherwise.
    """

    storages: list[torch.UntypedStorage]
    sizes: list[int]
    begins: list[int]
    regions: Regions[int] | None


class MemoryBlock:
    """One block in memory; see :class:`~netloader.codecs.block_view.BlockView`.

    It keeps the memory alive, also after the tensors were freed. Each byte view taken from it does the same.

    Attributes:
        number: Number of the block.
        nbytes: Bytes in all.
    """

    __slots__ = (
        *("_addresses", "_block", "_buffers", "_copies", "_device", "_regions", "_storages", "_tensors"),
        *("nbytes", "number"),
    )

    def __init__(
        self,
        block: Block,
        device: torch.device,
        storages: list[torch.UntypedStorage],
        addresses: list[int],
        copies: dict[int, PlainCopy],
        regions: Regions[int] | None,
    ) -> None:
        self.number = block.number
        self.nbytes = block.nbytes
        self._block = block
        self._device = device
        self._storages = storages  # one for each span
        self._addresses = addresses
        self._copies = copies  # of tensors in a private format, by place of the span
        self._tensors: list[torch.Tensor] | None = None
        self._buffers: list[memoryview] | None = None
        self._regions = regions

    def __repr__(self) -> str:
        return f"<block {self.number}: {self.nbytes} bytes in {len(self._addresses)} spans on {self._device}>"

    def tensors(self) -> Sequence[torch.Tensor]:
        """The spans in order, as one-dimensional, contiguous ``uint8`` tensors over the memory.

        They share only the memory with the original tensors. Autograd does not see writes to them.
        """
        if self._tensors is None:
            made = []
            offset, spans = self._block.offset, zip(self._storages, self._addresses, self._block.sizes, strict=True)
            for place, (storage, address, nbytes) in enumerate(spans):
                if place in self._copies:
                    made.append(self._copies[place].rows()[offset : offset + nbytes])
                    continue
                empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
                made.append(empty.set_(storage, address - storage.data_ptr(), (nbytes,), (1,)))
            self._tensors = made
        return self._tensors

    def settle(self) -> None:
        """Convert the filled bytes into a device's private memory format, if the block has tensors in one.

        Waits for the device, so it must not run on the event loop.
        """
        if not self._copies:
            return
        for copy in {id(copy): copy for copy in self._copies.values()}.values():
            copy.write_back()

    def buffers(self) -> Sequence[memoryview]:
        """The spans in order, as writable byte views.

        Raises:
            TransportUnavailable: Some of the memory is not CPU memory.
        """
        self._check_reachable()
        if self._buffers is None:
            base = min(self._addresses)
            window = _WINDOW.from_address(base)
            # A byte view keeps its window alive, and the window has to keep the memory.
            window.storages = self._storages  # type: ignore[attr-defined]  # a ctypes array takes any attribute
            whole = memoryview(window).cast("B")
            self._buffers = [
                whole[address - base : address - base + nbytes]
                for address, nbytes in zip(self._addresses, self._block.sizes, strict=True)
            ]
        return self._buffers

    def regions(self) -> Regions[int]:
        """The spans in order, as addresses and sizes: much cheaper than byte views.

        Valid while this object exists. Must not be changed.

        Raises:
            TransportUnavailable: Some of the memory is not CPU memory.
        """
        if self._regions is None:
            self._check_reachable()
            self._regions = regions_over(self._addresses, self._block.sizes)
        return self._regions

    def _check_reachable(self) -> None:
        if self._device.type != "cpu" and not all(storage.device.type == "cpu" for storage in self._storages):
            raise TransportUnavailable(
                f"block {self.number} is on {self._device}, byte views exist for CPU memory only"
            )


class TensorMemory:
    """The memory of one set of tensors. Made by :func:`~netloader.tensors.describe`.

    Each tensor is identified by its address. If a tensor has been given other memory (``param.data = ...``), this is
    detected, and the old address is neither read nor written.

    Args:
        manifest: Manifest of `tensors`.
        tensors: In the order of the manifest.
        device: Where they live. A server may have copies of some of them in the CPU's memory.
        addresses: Where each begins, when that is known already.
        weak: Hold them by weak references.
        keep: Cache the placement of each block, which keeps the memory alive. For a server, which sends the same blocks
            to several clients. Not together with `weak`.

    Attributes:
        device: Device of the tensors, as torch names it (``cpu``, ``cuda:0``).
        call_bytes: None: views own no memory, so any number of them may be in one call of a channel.
    """

    call_bytes: int | None = None

    def __init__(
        self,
        manifest: Manifest,
        tensors: Sequence[torch.Tensor],
        device: torch.device,
        *,
        addresses: list[int] | None = None,
        weak: bool = False,
        keep: bool = False,
    ) -> None:
        self.device = str(device)
        self._device = device
        self._manifest = manifest
        self._copies = PlainCopies()
        self._private: frozenset[int] = frozenset()
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - has no other name
            self._addresses = addresses or [tensor.data_ptr() for tensor in tensors]
            if device.type == "npu":
                # Read from the tensors, not from the manifest: an engine may have changed a tensor to a private format
                # after the manifest was made, or replaced it by a plain copy. The plain form is sent in both cases.
                self._private = frozenset(i for i, tensor in enumerate(tensors) if is_private(tensor))
        self._tensors: list[torch.Tensor] = [] if weak else list(tensors)
        self._references: list[Callable[[], torch.Tensor | None]] = [weakref.ref(t) for t in tensors] if weak else []
        self._keep = keep
        # The placements of blocks of one plan.
        self._cache: tuple[Plan | None, dict[int, _Placement]] = (None, {})

    def weaken(self) -> None:
        """Hold the tensors by weak references from now on, so that they are freed when their owner drops them.

        For the end of a pull or of serving. Objects of the sessions may be in reference cycles, which exist until the
        next garbage collection, and must not keep the memory until then.
        """
        if self._tensors:
            self._references = [weakref.ref(tensor) for tensor in self._tensors]
        self._keep, self._tensors, self._cache = False, [], (None, {})

    def views(self, plan: Plan, numbers: Sequence[int]) -> list[MemoryBlock]:
        """Views of these blocks, in this order.

        Args:
            plan: A plan of this memory's manifest.
            numbers: Blocks of the plan.

        Raises:
            ManifestError: Some of the memory is gone or was replaced, or the plan was made for other tensors.
        """
        self._check(plan)
        # Bypasses the hooks of tensor subclasses: they are several times slower, and only memory matters here.
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - has no other name
            found = self._cached_placements(plan, numbers) or self._placements(plan, numbers)
            if found is None:
                raise self._gone(plan, numbers)
            return [
                MemoryBlock(
                    plan.blocks[number],
                    self._device,
                    one.storages,
                    one.begins,
                    self._copies_of(plan.blocks[number]) if self._private else {},
                    one.regions,
                )
                for number, one in zip(numbers, found, strict=True)
            ]

    def _copies_of(self, block: Block) -> dict[int, PlainCopy]:
        """Plain copies of the block's tensors that are in a private format, by place of the span."""
        return {
            place: self._copies.of(index, tensor)
            for place, index in enumerate(block.tensors)
            if index in self._private and (tensor := self._tensor(index)) is not None
        }

    def missing(self, plan: Plan, numbers: Sequence[int]) -> dict[int, str]:
        """The blocks among `numbers` whose memory is gone, each with the tensor and the reason."""
        self._check(plan)
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - has no other name
            if self._cached_placements(plan, numbers) is not None or self._placements(plan, numbers) is not None:
                return {}
            return {number: why for number in numbers if (why := self._why_missing(plan, number))}

    def _why_missing(self, plan: Plan, number: int) -> str:
        """Why the memory of a block is gone; empty when it is not."""
        block = plan.blocks[number]
        for index, nbytes in zip(block.tensors, block.sizes, strict=True):
            reason = self._problem(index, block.offset + nbytes)
            if reason:
                self._cache[1].pop(number, None)  # the cache must not keep replaced memory alive
                return f"{self._manifest.tensors[index].name} {reason}"
        return ""

    def _cached_placements(self, plan: Plan, numbers: Sequence[int]) -> list[_Placement] | None:
        """The cached placements of these blocks; None when one is not cached or not valid any more.

        Checks all blocks at once, because a server checks each block when it grants it and again when it sends it.
        """
        kept_for, by_number = self._cache  # read in one step: another thread may replace it for another plan
        if kept_for is not plan or self._private:
            return None
        kept = {number: one for number in numbers if (one := by_number.get(number)) is not None}
        if len(kept) < len(numbers):
            return None
        for part in in_groups(plan, numbers, BATCH_TENSORS):
            places = list(chain.from_iterable(plan.blocks[number].tensors for number in part))
            if not self._in_place(self._tensors_at(places), places):
                return None
            holders = chain.from_iterable(kept[number].storages for number in part)
            sizes = list(chain.from_iterable(kept[number].sizes for number in part))
            if list(map(torch.UntypedStorage.nbytes, holders)) != sizes:
                return None
        return list(kept.values())

    def _in_place(self, tensors: list[torch.Tensor] | None, places: Sequence[int]) -> bool:
        """Whether these tensors still have their described addresses. No Python loop, because there may be many."""
        if tensors is None:
            return False
        return list(map(torch.Tensor.data_ptr, tensors)) == list(map(self._addresses.__getitem__, places))

    def _tensors_at(self, places: Sequence[int]) -> list[torch.Tensor] | None:
        """The tensors at these places of the manifest; None when one was freed."""
        if not self._references:
            return list(map(self._tensors.__getitem__, places))
        found = [self._references[index]() for index in places]
        tensors = [tensor for tensor in found if tensor is not None]
        return tensors if len(tensors) == len(found) else None

    def detached(self, index: int) -> torch.Tensor:
        """The tensor at this place of the manifest, as one that keeps its present memory.

        Raises:
            ManifestError: It was freed, or was given other memory.
        """
        tensor = self._tensor(index)
        found = None if tensor is None else tensor.detach()
        if found is None or found.data_ptr() != self._addresses[index]:
            reason = "was dropped by its owner" if found is None else "was given other memory"
            raise ManifestError(f"{self._manifest.tensors[index].name} is gone: it {reason}")
        return found

    def _tensor(self, index: int) -> torch.Tensor | None:
        return self._references[index]() if self._references else self._tensors[index]

    def _placements(self, plan: Plan, numbers: Sequence[int]) -> list[_Placement] | None:
        """The placements of these blocks; None when some memory is gone.

        The time grows with the number of tensors, not with their bytes.
        """
        found: list[_Placement] = []
        for part in in_groups(plan, numbers, BATCH_TENSORS):
            some = self._batch_placements(plan, part)
            if some is None:
                return None
            found += some
        return found

    def _batch_placements(self, plan: Plan, numbers: Sequence[int]) -> list[_Placement] | None:
        """The same for one batch."""
        blocks = [plan.blocks[number] for number in numbers]
        places = list(chain.from_iterable(block.tensors for block in blocks))
        tensors = self._tensors_at(places)
        if tensors is None or not self._in_place(tensors, places):
            return None
        storages = list(map(torch.Tensor.untyped_storage, tensors))
        sizes = list(map(torch.UntypedStorage.nbytes, storages))
        begins = list(map(self._addresses.__getitem__, places))
        pasts = list(accumulate(len(block.tensors) for block in blocks))
        for past, block in zip(pasts, blocks, strict=True):
            if block.offset:  # a part of one large tensor
                begins[past - 1] += block.offset
        ends = map(add, map(torch.UntypedStorage.data_ptr, storages), sizes)
        needed = map(add, begins, chain.from_iterable(block.sizes for block in blocks))
        if any(map(lt, ends, needed)):
            return None
        parts = [slice(past - len(block.tensors), past) for past, block in zip(pasts, blocks, strict=True)]
        again = self._keep and self._device.type == "cpu" and not self._private
        found = [
            _Placement(
                storages[part], sizes[part], begins[part], regions_over(begins[part], block.sizes) if again else None
            )
            for part, block in zip(parts, blocks, strict=True)
        ]
        if self._keep:
            kept_for, kept = self._cache  # read in one step, so that placements of two plans are not mixed
            if kept_for is not plan:
                _, kept = self._cache = (plan, {})
            kept.update(zip(numbers, found, strict=True))
        return found

    def _problem(self, index: int, nbytes: int) -> str:
        tensor = self._tensor(index)
        if tensor is None:
            return "was dropped by its owner"
        if tensor.data_ptr() != self._addresses[index]:
            return "was given other memory"
        storage = tensor.untyped_storage()
        if self._addresses[index] + nbytes > storage.data_ptr() + storage.nbytes():
            return "has less memory than it had"
        return ""

    def _gone(self, plan: Plan, numbers: Sequence[int]) -> ManifestError:
        missing = self.missing(plan, numbers) or {numbers[0]: "it changed during the check"}
        number, reason = next(iter(missing.items()))
        return ManifestError(
            f"block {number} is gone: {reason}", hint="describe the tensors again after they were replaced"
        )

    def _check(self, plan: Plan) -> None:
        if plan.manifest is not self._manifest:
            if plan.manifest != self._manifest:
                raise ManifestError("the plan was made for other tensors than these")
            # Equal: keep this object, so that the next call need not compare.
            self._manifest = plan.manifest
