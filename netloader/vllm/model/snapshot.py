"""A rank's raw tensors: which they are, and what became of each when vLLM made them ready for its kernels.

Raw means: as `load_weights` leaves them. vLLM then rewrites some of them (`process_weights_after_loading`): it packs,
transposes, requantises, replaces. Which ones depends on the model, the quantisation and the machine, so it is found
out by looking: digests of blocks before, and after.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from netloader.core.manifest import DIGEST_BYTES
from netloader.vllm.model.copies import Copies, Keep, make_copies
from netloader.vllm.model.digest import digest_of
from netloader.vllm.model.initial_values import bits_of
from netloader.vllm.model.processed import outside
from netloader.vllm.model.registered import weights_of

if TYPE_CHECKING:
    import torch

    from netloader.core.protocol.events import Announcement

__all__ = ["RawWeights", "Settled", "UnnamedTensors", "named_raw_tensors", "same_bits"]

ALWAYS_HELD_BYTES = 4096
"""Tensors up to this size are copied whatever the settings say: scales that vLLM folds away and drops."""

_CORNER = 16

_REPLACED = "vLLM replaced it"
_IN_PLACE = "vLLM rewrote it in place"
_NO_ROOM = "vLLM rewrote it, and there was no memory for a copy"


def named_raw_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer of `model`, in the order of its modules, under every name that it has.

    Modules that hang in a plain mapping, list or object are no exception, although vLLM's own loading does not see
    them: their names begin with the path to them (`pooler.poolers_by_task[embed].head.projector.0.weight`), and come
    last. Tied weights come under all their names. Non-persistent buffers (rotary caches) are left out: they are
    computed when the model is built and are in no checkpoint.
    """
    return dict(_named(model))


def _named(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in [*model.named_modules(remove_duplicate=False), *outside(model).modules.items()]:
        start = f"{prefix}." if prefix else ""
        for name, tensor in weights_of(module):
            yield start + name, tensor


class UnnamedTensors:
    """The tensors that `named_raw_tensors` leaves out, at one moment, to find out what loading changed.

    Computed ones (rotary caches, maps of experts) are what they are when the model is built. One that loading fills or
    adds is a weight that a client would never get.

    Args:
        model: The model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._before = _unnamed(model)

    def changed_by_loading(self, model: torch.nn.Module) -> list[str]:
        """Names of those that hold something else now, or were not there; sorted."""
        return sorted(name for name, digest in _unnamed(model).items() if self._before.get(name) != digest)


def _unnamed(model: torch.nn.Module) -> dict[str, str]:
    from torch.nn.parameter import is_lazy

    digests: dict[int, str] = {}
    found = outside(model).tensors
    for tensor in found.values():
        if id(tensor) not in digests:
            shape = "no shape" if is_lazy(tensor) else tuple(tensor.shape)
            unread = tensor.is_meta or is_lazy(tensor)
            digests[id(tensor)] = f"{tensor.dtype} {shape}" if unread else digest_of(tensor)
    return {name: digests[id(tensor)] for name, tensor in found.items()}


@dataclass
class _Raw:
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    address: int
    keep: Keep
    held: torch.Tensor | None = None

    def looks_like(self, tensor: torch.Tensor) -> bool:
        """Whether it may be the same, as far as can be told without its bytes."""
        if tensor.is_meta:
            return False
        return (tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())) == (self.dtype, self.shape, self.stride)

    @property
    def copied(self) -> bool:
        """Whether a copy was asked for."""
        return self.keep not in (Keep.NO, Keep.REFERENCE)


@dataclass
class Settled:
    """What a server can offer of the raw layout once vLLM is done.

    Attributes:
        live: Tensors that are still what they were; weakly, since vLLM may drop them later (a draft's embeddings).
        kept: Originals of tensors that were replaced, dropped or rewritten; they live as long as this object.
        lost: Why the remaining ones cannot be served, by name.
        reasons: Why each of `kept` was kept.
    """

    live: dict[str, weakref.ref[torch.Tensor]] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, Keep] = field(default_factory=dict)

    @property
    def kept_bytes(self) -> int:
        """Memory that the originals take, each counted once."""
        return sum(self.costs().values())

    def costs(self) -> dict[tuple[Keep, str], int]:
        """The same by what it is kept for, and by device."""
        costs: dict[tuple[Keep, str], int] = {}
        seen = set()
        for name, tensor in self.kept.items():
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                key = (self.reasons[name], str(tensor.device))
                costs[key] = costs.get(key, 0) + storage.nbytes()
        return costs


class RawWeights:
    """The raw tensors of one model, recorded at the end of `load_weights`.

    A tensor for which a copy is asked is copied now, inside the load, so that vLLM counts the memory. One that is kept
    by reference costs nothing now: when vLLM puts another tensor in its place, the original stays; when vLLM rewrites
    it in place, that is noticed, and it is lost. What vLLM leaves alone is served where it lies, and its copy is freed.

    Args:
        model: The model, loaded and not yet post-processed.
        announcement: What its tensors are, with the digests of their blocks.
        hold: Says for a name what is to be kept of it.

    Attributes:
        copies: What was copied, by what it was copied for.
        device: Where the tensors are, as torch names it; the CPU's memory, where there are none.
    """

    def __init__(self, model: torch.nn.Module, announcement: Announcement, hold: Callable[[str], Keep]) -> None:
        self._raw: dict[str, _Raw] = {}
        self._announcement = announcement
        self.copies: dict[Keep, Copies] = {}
        self.device = "cpu"
        named = named_raw_tensors(model)
        wanted: dict[Keep, dict[str, torch.Tensor]] = {}
        for spec in announcement.manifest.tensors:
            name, tensor = spec.name, named[spec.name]
            keep = hold(name)
            self.device = str(tensor.device)
            if tensor.nbytes <= ALWAYS_HELD_BYTES and keep in (Keep.NO, Keep.REFERENCE):
                keep = Keep.SMALL
            held = tensor.detach() if keep is Keep.REFERENCE else None
            shape, stride, address = tuple(tensor.shape), tuple(tensor.stride()), tensor.data_ptr()
            self._raw[name] = raw = _Raw(tensor.dtype, shape, stride, address, keep, held)
            if raw.copied:
                wanted.setdefault(keep, {})[name] = tensor
        for keep, tensors in wanted.items():
            self.copies[keep] = copies = make_copies(tensors, on_device=keep is not Keep.DRAM)
            for name, copy in copies.made.items():
                self._raw[name].held = copy

    def names(self) -> tuple[str, ...]:
        """All names, in order."""
        return tuple(self._raw)

    def held(self) -> dict[str, torch.Tensor]:
        """The tensors that are held, as they were loaded."""
        return {name: raw.held for name, raw in self._raw.items() if raw.held is not None}

    def settle(self, model: torch.nn.Module) -> Settled:
        """Look at the post-processed `model` and sort every raw tensor; originals no longer needed are let go.

        For each tensor, what may hold its bytes now is chosen; then all of that is hashed, once, in the blocks that
        were announced. Where a block differs and has several tensors, nothing tells which of them was rewritten: each
        that has no copy counts as lost. A tensor whose block can't be hashed, because another one in it is gone, is
        left out.
        """
        now = named_raw_tensors(model)
        settled, found = Settled(), {}
        for name, raw in self._raw.items():
            chosen = _chosen(raw, now.get(name))
            if chosen is not None:
                found[name] = chosen
            elif raw.copied:
                settled.lost[name] = _NO_ROOM
            else:
                settled.lost[name] = "vLLM dropped it" if now.get(name) is None else _REPLACED
        known = self._known(found, settled.lost)
        for name, tensor in found.items():
            raw = self._raw[name]
            if name not in known:
                continue
            if tensor is raw.held:
                settled.kept[name] = tensor
                settled.reasons[name] = raw.keep
            else:
                settled.live[name] = weakref.ref(tensor)
        for raw in self._raw.values():
            raw.held = None
        self.copies.clear()
        return settled

    def _known(self, found: Mapping[str, torch.Tensor], lost: dict[str, str]) -> set[str]:
        """The names of those that hold what was announced; the reasons for others are added to `lost`."""
        import torch

        from netloader.tensors import HASHERS, Memory, digest_blocks

        announcement = self._announcement
        manifest, plan = announcement.manifest, announcement.plan
        nothing = torch.empty(0)
        tensors = [found.get(spec.name, nothing) for spec in manifest.tensors]
        memory = Memory(manifest, tensors, torch.device(self.device))
        whole = [n for n in range(len(plan.blocks)) if all(name in found for name in plan.tensors_of(n))]
        digests = digest_blocks(memory, plan, whole, announcement.algorithm, threads=HASHERS)
        unknown = set[str]().union(*(plan.tensors_of(n) for n in set(range(len(plan.blocks))).difference(whole)))
        for place, number in enumerate(whole):
            here, there = (at * DIGEST_BYTES for at in (place, number))
            if digests[here : here + DIGEST_BYTES] != announcement.digests[there : there + DIGEST_BYTES]:
                names = plan.tensors_of(number)
                unknown.update(names)
                lost.update(self._changed({name: found[name] for name in names}))
        for spec in manifest.tensors:
            if spec.alias_of and (
                spec.alias_of in unknown or not _same(found.get(spec.name), found.get(spec.alias_of))
            ):
                unknown.add(spec.name)
                lost.setdefault(spec.name, lost.get(spec.alias_of, _IN_PLACE))
        return found.keys() - unknown

    def _changed(self, found: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Those of one block, which is not what it was, that may be the reason, each with what became of it.

        What lies elsewhere now, and of which nothing is held, is the reason before all others.
        """
        without = {
            name: self._raw[name] for name in found if self._raw[name].held is None or not self._raw[name].copied
        }
        moved = [n for n, raw in without.items() if raw.held is None and found[n].data_ptr() != raw.address]
        if moved:
            return {name: _NO_ROOM if without[name].copied else _REPLACED for name in moved}
        reason = _IN_PLACE if len(without) == 1 else f"{_IN_PLACE}, or a tensor of the same block"
        return {name: _NO_ROOM if self._raw[name].copied else reason for name in without or found}


def _chosen(raw: _Raw, current: torch.Tensor | None) -> torch.Tensor | None:
    """What may hold the bytes of a raw tensor now: itself where it lies, or what was held; None when nothing may."""
    if current is None or not raw.looks_like(current):
        return raw.held
    return current if raw.held is None or _same(current, raw.held) else raw.held


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether these hold the same bits: two tensors of one dtype, shape and order."""
    if one is None or other is None:
        return False
    return (one.device == other.device and one.data_ptr() == other.data_ptr()) or same_bits(one, other)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one dtype, shape and order hold the same bits, wherever they are."""
    import torch

    from netloader.codecs.npu_formats import is_private, to_plain

    first, second = (to_plain(t) if is_private(t) else t for t in (one.detach(), other.detach()))
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    corner = (slice(0, _CORNER),) * first.dim()
    for part in (corner, ...):  # what differs mostly differs at once
        pair = [bits_of(tensor[part]) for tensor in (first, second)]
        if pair[0].device != pair[1].device:
            pair = [tensor.cpu() for tensor in pair]
        if not torch.equal(*pair):
            return False
    return True
