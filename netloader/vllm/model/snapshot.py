"""A rank's raw tensors, and where each of them is after vLLM's post-processing.

Raw tensors are those that `load_weights` leaves. Post-processing (`process_weights_after_loading`) packs, transposes,
requantises or replaces some of them. Which ones depends on the model, the quantisation and the machine. So digests of
blocks before and after post-processing are compared. Where the raw bytes can be computed from what post-processing
made, no original is needed (see `netloader.vllm.model.inverses`).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from netloader.core.manifest import DIGEST_BYTES
from netloader.vllm.model.copies import Copies, Keep, is_full, make_copies
from netloader.vllm.model.digest import digest_of
from netloader.vllm.model.initial_values import bits_of
from netloader.vllm.model.object_walk import outside
from netloader.vllm.model.registered import weights_of

if TYPE_CHECKING:
    import torch

    from netloader.core.protocol.events import Announcement
    from netloader.tensors import Inverse, Scratch

__all__ = ["ALWAYS_COPIED_BYTES", "Located", "RawWeights", "UnnamedTensors", "named_raw_tensors", "same_bits"]

log = logging.getLogger(__name__)

ALWAYS_COPIED_BYTES = 4096
"""Tensors up to this size are always copied, for example scales that vLLM merges into others and drops."""

_CORNER = 16

_COMPUTED = (Keep.NO, Keep.REFERENCE, Keep.COPY)
"""What is computed from the model's tensors, if possible. The other settings ask for copies, or cost nothing."""

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
    sample: bytes = b""

    def may_be(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` may hold the raw values: its dtype, shape and strides are the same."""
        if tensor.is_meta:
            return False
        return (tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())) == (self.dtype, self.shape, self.stride)

    @property
    def copied(self) -> bool:
        """Whether a copy was asked for."""
        return self.keep not in (Keep.NO, Keep.REFERENCE)


@dataclass(frozen=True)
class _Found:
    """A tensor that has the raw bytes, as they are or read by an inverse."""

    tensor: torch.Tensor
    inverse: Inverse | None = None

    def equals(self, other: _Found | None) -> bool:
        """Whether both have the same raw bytes, if they have the same dtype, shape and strides."""
        if other is None or self.inverse != other.inverse:
            return False
        if self.inverse is None:
            return _same(self.tensor, other.tensor)
        return self.tensor.data_ptr() == other.tensor.data_ptr()


@dataclass
class Located:
    """Where each raw tensor is after post-processing.

    Attributes:
        live: Weak references to tensors of the model that are still raw, or from which the raw bytes are computed. vLLM
            may drop them later (a draft's embeddings).
        kept: Originals of tensors that were replaced, dropped or rewritten. This object keeps them alive.
        lost: Why the remaining raw tensors cannot be served, by name.
        reasons: The setting by which each of `kept` was kept.
        inverses: How the bytes of some of `live` are computed.
        scratch: The memory for that; None if none are computed.
    """

    live: dict[str, weakref.ref[torch.Tensor]] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, Keep] = field(default_factory=dict)
    inverses: dict[str, Inverse] = field(default_factory=dict)
    scratch: Scratch | None = None

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
    copy is freed. If the raw bytes can be computed from what vLLM made of it, what KEEP_RAW keeps is freed too. Copies
    that INT8_CACHE asks for are used instead.

    Args:
        model: The model, loaded and not yet post-processed.
        announcement: The manifest of its tensors, with the digests of their blocks.
        policy: Returns for a name what is kept of that tensor.

    Attributes:
        announcement: The manifest and digests.
        copies: The copies, by the setting that asks for them.
        device: The device of the tensors, as torch names it; the CPU when there are no tensors.
    """

    def __init__(self, model: torch.nn.Module, announcement: Announcement, policy: Callable[[str], Keep]) -> None:
        self._raw: dict[str, _Raw] = {}
        self.announcement = announcement
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
        self._scratch = self._take_samples(named)

    def _take_samples(self, named: Mapping[str, torch.Tensor]) -> Scratch | None:
        """Note what tells the ways back apart, for tensors that INT8_CACHE does not copy. Returns what reads it."""
        from netloader.codecs.npu_formats import is_private
        from netloader.vllm.model.inverses import as_it_is, sample_of

        wanted = [
            name
            for name, raw in self._raw.items()
            if raw.keep in _COMPUTED and named[name].nbytes > ALWAYS_COPIED_BYTES and not is_private(named[name])
        ]
        scratch = _scratch_on(self.device) if wanted else None
        if scratch is not None:
            for name in wanted:
                tensor = named[name].detach()
                self._raw[name].sample = sample_of(tensor, as_it_is(tensor.nbytes), tensor.nbytes, scratch)
        return scratch

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
        located, found = Located(), dict[str, _Found]()
        if self._scratch is not None:
            self._scratch.follow()
        for name, raw in self._raw.items():
            candidate = self._candidate(raw, now.get(name))
            if candidate is not None:
                found[name] = candidate
            elif raw.copied:
                located.lost[name] = _NO_ROOM
            else:
                located.lost[name] = "vLLM dropped it" if now.get(name) is None else _REPLACED
        known = self._known(found, located.lost)
        for name, one in found.items():
            raw = self._raw[name]
            if name not in known:
                continue
            if one.tensor is raw.original:
                located.kept[name] = one.tensor
                located.reasons[name] = raw.keep
                continue
            located.live[name] = weakref.ref(one.tensor)
            if one.inverse is not None:
                located.inverses[name] = one.inverse
                located.scratch = self._scratch
        for raw in self._raw.values():
            raw.original = None
        self._scratch = None
        self.copies.clear()
        return located

    def _candidate(self, raw: _Raw, current: torch.Tensor | None) -> _Found | None:
        """What may have the raw bytes: the model's tensor, as it is or by an inverse, or the original; or None."""
        from netloader.vllm.model.inverses import Form, as_it_is, find_inverse

        may_be = current is not None and raw.may_be(current)
        if current is not None and raw.sample and self._scratch is not None and not current.is_meta:
            form = Form(raw.dtype, raw.shape, raw.stride)
            inverse = find_inverse(form, raw.sample, current, self._scratch)
            if inverse is not None:
                return _Found(current, None if inverse == as_it_is(form.nbytes) else inverse)
        if current is not None and may_be and (raw.original is None or _same(current, raw.original)):
            return _Found(current)
        return None if raw.original is None else _Found(raw.original)

    def _known(self, found: dict[str, _Found], lost: dict[str, str]) -> set[str]:
        """Names of the tensors that have the announced contents. For the others, the reasons are added to `lost`.

        If a tensor of the model looked right and is not, its original takes its place in `found`, where there is one.
        """
        while True:
            wrong: dict[str, str] = {}
            known = self._compared(found, wrong)
            originals = {
                name: _Found(original)
                for name in found.keys() - known
                if (original := self._raw[name].original) is not None and found[name].tensor is not original
            }
            if not originals:
                lost.update(wrong)
                return known
            found.update(originals)

    def _compared(self, found: Mapping[str, _Found], lost: dict[str, str]) -> set[str]:
        """The same for the tensors in `found`. Hashes all of their blocks."""
        import torch

        from netloader.tensors import HASHERS, ComputedMemory, Scratch, TensorMemory, digest_blocks

        announcement = self.announcement
        manifest, plan = announcement.manifest, announcement.plan
        nothing = torch.empty(0)
        places = [found.get(spec.name, _Found(nothing)) for spec in manifest.tensors]
        inverses = {place: one.inverse for place, one in enumerate(places) if one.inverse is not None}
        device = torch.device(self.device)
        in_place = TensorMemory(manifest, [one.tensor for one in places], device)
        memory = ComputedMemory(in_place, inverses, self._scratch or Scratch(torch.device("cpu")))
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
            one, owner = found.get(spec.name), found.get(spec.alias_of)
            if one is None or not one.equals(owner):
                unknown.add(spec.name)
                lost.setdefault(spec.name, lost.get(spec.alias_of, _IN_PLACE))
            elif spec.alias_of in unknown:
                unknown.add(spec.name)
                if spec.alias_of in lost:  # otherwise another tensor of its block is
                    lost.setdefault(spec.name, lost[spec.alias_of])
        return found.keys() - unknown

    def _changed(self, found: Mapping[str, _Found]) -> dict[str, str]:
        """The tensors that may have changed the digest of their block, each with the reason why it is lost.

        If a tensor has another address now and no original, only such tensors are named.
        """
        without = {
            name: self._raw[name] for name in found if self._raw[name].original is None or not self._raw[name].copied
        }
        moved = [n for n, raw in without.items() if raw.original is None and found[n].tensor.data_ptr() != raw.address]
        if moved:
            return {name: _NO_ROOM if without[name].copied else _REPLACED for name in moved}
        reason = _IN_PLACE if len(without) == 1 else f"{_IN_PLACE}, or a tensor of the same block"
        return {name: _NO_ROOM if self._raw[name].copied else reason for name in without or found}


def _scratch_on(device: str) -> Scratch | None:
    """Scratch memory; None if the device is full."""
    import torch

    from netloader.tensors import Scratch

    try:
        scratch = Scratch(torch.device(device), tiled=device.startswith("npu"))
    except RuntimeError as error:
        if not is_full(error):
            raise
        log.warning("netloader: %s is full, so no raw tensor is computed from what replaces it: %s", device, error)
        return None
    scratch.follow()
    return scratch


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
