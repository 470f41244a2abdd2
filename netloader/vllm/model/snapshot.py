"""A rank's raw tensors, and where each of them is after vLLM's post-processing.

Raw tensors are those that `load_weights` leaves. Post-processing (`process_weights_after_loading`) packs, transposes,
requantises or replaces some of them. Which ones depends on the model, the quantisation and the machine. So digests of
blocks before and after post-processing are compared.
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

__all__ = ["Located", "RawWeights", "UnnamedTensors", "named_raw_tensors", "same_bits"]

ALWAYS_COPIED_BYTES = 4096
"""Tensors up to this size are always copied, for example scales that vLLM merges into others and drops."""

_CORNER = 16

_REPLACED = "vLLM replaced it"
_IN_PLACE = "vLLM rewrote it in place"
_NO_ROOM = "vLLM rewrote it, and there was no memory for a copy"


def named_raw_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer of `model`, in the order of its modules, under every name that it has.

    This includes modules in a plain mapping, list or object, although vLLM's own loading does not reach them. Their
    names begin with the path to them (`pooler.poolers_by_task[embed].head.projector.0.weight`), and come last. Tied
    weights have all their names. Non-persistent buffers (rotary caches) are left out, because they are computed when
    the model is built, and are in no checkpoint.
    """
    return dict(_named(model))


def _named(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, module in [*model.named_modules(remove_duplicate=False), *outside(model).modules.items()]:
        start = f"{prefix}." if prefix else ""
        for name, tensor in weights_of(module):
            yield start + name, tensor


class UnnamedTensors:
    """The tensors that `named_raw_tensors` leaves out, at one moment, to determine what loading changes.

    Computed tensors (rotary caches, expert maps) have their contents when the model is built. A tensor that loading
    fills or adds is a weight that a client would not get.

    Args:
        model: The model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._before = _unnamed(model)

    def changed_by_loading(self, model: torch.nn.Module) -> list[str]:
        """Sorted names of the tensors that were changed or added."""
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
    original: torch.Tensor | None = None

    def may_be(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` may hold the raw values: its dtype, shape and strides are the same."""
        if tensor.is_meta:
            return False
        return (tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())) == (self.dtype, self.shape, self.stride)

    @property
    def copied(self) -> bool:
        """Whether a copy was asked for."""
        return self.keep not in (Keep.NO, Keep.REFERENCE)


@dataclass
class Located:
    """Where each raw tensor is after post-processing.

    Attributes:
        live: Weak references to tensors of the model that are still raw. vLLM may drop them later (a draft's
            embeddings).
        kept: Originals of tensors that were replaced, dropped or rewritten. This object keeps them alive.
        lost: Why the remaining raw tensors cannot be served, by name.
        reasons: The setting by which each of `kept` was kept.
    """

    live: dict[str, weakref.ref[torch.Tensor]] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, Keep] = field(default_factory=dict)

    @property
    def kept_bytes(self) -> int:
        """Bytes of all originals, each counted once."""
        return sum(self.costs().values())

    def costs(self) -> dict[tuple[Keep, str], int]:
        """Bytes of the originals, by setting and device."""
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

    Copies are made at once, during the load, so that vLLM's memory measurement includes them. A tensor that is kept by
    reference takes no memory at first. If vLLM replaces it, the original stays alive. If vLLM rewrites it in place, the
    digests show that, and the original is lost. A tensor that vLLM does not change is served from the model, and its
    copy is freed.

    Args:
        model: The model, loaded and not yet post-processed.
        announcement: The manifest of its tensors, with the digests of their blocks.
        policy: Returns for a name what is kept of that tensor.

    Attributes:
        copies: The copies, by the setting that asks for them.
        device: The device of the tensors, as torch names it; the CPU when there are no tensors.
    """

    def __init__(self, model: torch.nn.Module, announcement: Announcement, policy: Callable[[str], Keep]) -> None:
        self._raw: dict[str, _Raw] = {}
        self._announcement = announcement
        self.copies: dict[Keep, Copies] = {}
        self.device = "cpu"
        named = named_raw_tensors(model)
        wanted: dict[Keep, dict[str, torch.Tensor]] = {}
        for spec in announcement.manifest.tensors:
            name, tensor = spec.name, named[spec.name]
            keep = policy(name)
            self.device = str(tensor.device)
            if tensor.nbytes <= ALWAYS_COPIED_BYTES and keep in (Keep.NO, Keep.REFERENCE):
                keep = Keep.SMALL
            original = tensor.detach() if keep is Keep.REFERENCE else None
            shape, stride, address = tuple(tensor.shape), tuple(tensor.stride()), tensor.data_ptr()
            self._raw[name] = raw = _Raw(tensor.dtype, shape, stride, address, keep, original)
            if raw.copied:
                wanted.setdefault(keep, {})[name] = tensor
        for keep, tensors in wanted.items():
            self.copies[keep] = copies = make_copies(tensors, on_device=keep is not Keep.DRAM)
            for name, copy in copies.made.items():
                self._raw[name].original = copy

    def names(self) -> tuple[str, ...]:
        """All names, in order."""
        return tuple(self._raw)

    def originals(self) -> dict[str, torch.Tensor]:
        """The originals that are kept, by name."""
        return {name: raw.original for name, raw in self._raw.items() if raw.original is not None}

    def locate(self, model: torch.nn.Module) -> Located:
        """Find every raw tensor in the post-processed `model` or among the originals. Other originals are freed.

        For each raw tensor, a candidate is chosen that may hold its bytes. Then all candidates are hashed, once, in the
        blocks that were announced. If the digest of a block with several tensors differs, it is not known which of them
        was rewritten, so each one without a copy counts as lost. A tensor whose block can't be hashed, because another
        tensor of the block is lost, is left out of the result.
        """
        now = named_raw_tensors(model)
        located, found = Located(), {}
        for name, raw in self._raw.items():
            candidate = _candidate(raw, now.get(name))
            if candidate is not None:
                found[name] = candidate
            elif raw.copied:
                located.lost[name] = _NO_ROOM
            else:
                located.lost[name] = "vLLM dropped it" if now.get(name) is None else _REPLACED
        known = self._known(found, located.lost)
        for name, tensor in found.items():
            raw = self._raw[name]
            if name not in known:
                continue
            if tensor is raw.original:
                located.kept[name] = tensor
                located.reasons[name] = raw.keep
            else:
                located.live[name] = weakref.ref(tensor)
        for raw in self._raw.values():
            raw.original = None
        self.copies.clear()
        return located

    def _known(self, found: Mapping[str, torch.Tensor], lost: dict[str, str]) -> set[str]:
        """Names of the tensors that have the announced contents. For the others, the reasons are added to `lost`."""
        import torch

        from netloader.tensors import HASHERS, TensorMemory, digest_blocks

        announcement = self._announcement
        manifest, plan = announcement.manifest, announcement.plan
        nothing = torch.empty(0)
        tensors = [found.get(spec.name, nothing) for spec in manifest.tensors]
        memory = TensorMemory(manifest, tensors, torch.device(self.device))
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
            if not spec.alias_of:
                continue
            if not _same(found.get(spec.name), found.get(spec.alias_of)):
                unknown.add(spec.name)
                lost.setdefault(spec.name, lost.get(spec.alias_of, _IN_PLACE))
            elif spec.alias_of in unknown:
                unknown.add(spec.name)
                if spec.alias_of in lost:  # otherwise another tensor of its block is
                    lost.setdefault(spec.name, lost[spec.alias_of])
        return found.keys() - unknown

    def _changed(self, found: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """The tensors that may have changed the digest of their block, each with the reason why it is lost.

        If a tensor has another address now and no original, only such tensors are named.
        """
        without = {
            name: self._raw[name] for name in found if self._raw[name].original is None or not self._raw[name].copied
        }
        moved = [n for n, raw in without.items() if raw.original is None and found[n].data_ptr() != raw.address]
        if moved:
            return {name: _NO_ROOM if without[name].copied else _REPLACED for name in moved}
        reason = _IN_PLACE if len(without) == 1 else f"{_IN_PLACE}, or a tensor of the same block"
        return {name: _NO_ROOM if self._raw[name].copied else reason for name in without or found}


def _candidate(raw: _Raw, current: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor that may hold the raw values: the model's tensor or the original; None when neither may."""
    if current is None or not raw.may_be(current):
        return raw.original
    return current if raw.original is None or _same(current, raw.original) else raw.original


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two tensors of equal dtype, shape and strides are the same memory or hold the same bits."""
    if one is None or other is None:
        return False
    return (one.device == other.device and one.data_ptr() == other.data_ptr()) or same_bits(one, other)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of equal dtype, shape and strides hold the same bits, on any devices."""
    import torch

    from netloader.codecs.npu_formats import is_private, to_plain

    first, second = (to_plain(t) if is_private(t) else t for t in (one.detach(), other.detach()))
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    corner = (slice(0, _CORNER),) * first.dim()
    for part in (corner, ...):  # a difference usually shows in the corner already
        pair = [bits_of(tensor[part]) for tensor in (first, second)]
        if pair[0].device != pair[1].device:
            pair = [tensor.cpu() for tensor in pair]
        if not torch.equal(*pair):
            return False
    return True
