"""A rank's raw tensors: which they are, and what became of each when vLLM made them ready for its kernels.

Raw means: as `load_weights` leaves them. vLLM then rewrites some of them (`process_weights_after_loading`): it packs,
transposes, requantises, replaces. Which ones depends on the model, the quantisation and the machine, so it is found
out by looking: a digest before, a digest after.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from netloader.vllm.copies import Copies, Keep, make_copies
from netloader.vllm.processed import outside

if TYPE_CHECKING:
    import torch

__all__ = ["Contents", "RawWeights", "Settled", "UnnamedTensors", "digest_of", "named_raw_tensors"]

ALWAYS_HELD_BYTES = 4096
"""Tensors up to this size are copied whatever the settings say: scales that vLLM folds away and drops."""


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
        for name, parameter in module._parameters.items():  # noqa: SLF001 - named_parameters() hides tied names
            if parameter is not None:
                yield start + name, parameter
        for name, buffer in module._buffers.items():  # noqa: SLF001 - as above, and it does not tell persistent ones
            if buffer is not None and name not in module._non_persistent_buffers_set:  # noqa: SLF001
                yield start + name, buffer


def digest_of(tensor: torch.Tensor) -> str:
    """Digest of a tensor's dtype, shape and elements (in row-major order), in hex."""
    import torch
    import xxhash

    from netloader.codecs.npu_formats import is_private, to_plain

    found = tensor.detach()
    # Tiles count as the rows that they stand for: those travel.
    plain = (to_plain(found) if is_private(found) else found).cpu().contiguous()
    digest = xxhash.xxh3_128(f"{plain.dtype}{tuple(plain.shape)}".encode())
    if plain.numel():
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


Contents = tuple[str, tuple[int, ...]]
"""Digest of a tensor's dtype, shape and elements, and its strides."""


@dataclass
class _Raw:
    digest: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    keep: Keep
    held: torch.Tensor | None = None


@dataclass
class Settled:
    """What a server can offer of the raw layout once vLLM is done.

    Attributes:
        live: Tensors that are still what they were; weakly, since vLLM may drop them later (a draft's embeddings).
        kept: Originals of tensors that were replaced, dropped or rewritten; they live as long as this object.
        lost: Why the remaining ones cannot be served, by name.
        contents: Digest and strides of each tensor as it was loaded: equal ones hold equal bytes.
        reasons: Why each of `kept` was kept.
    """

    live: dict[str, weakref.ref[torch.Tensor]] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    contents: dict[str, Contents] = field(default_factory=dict)
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
        hold: Says for a name what is to be kept of it.
        left_out: Names of tensors that are not served.

    Attributes:
        copies: What was copied, by what it was copied for.
        device: Where the tensors are, as torch names it; the CPU's memory, where there are none.
    """

    def __init__(
        self, model: torch.nn.Module, hold: Callable[[str], Keep], left_out: Collection[str] = frozenset()
    ) -> None:
        self._raw: dict[str, _Raw] = {}
        self.copies: dict[Keep, Copies] = {}
        self.device = "cpu"
        digests: dict[int, str] = {}
        wanted: dict[Keep, dict[str, torch.Tensor]] = {}
        for name, tensor in named_raw_tensors(model).items():
            if name in left_out:
                continue
            digest = digests.get(id(tensor)) or digest_of(tensor)
            digests[id(tensor)] = digest
            keep = hold(name)
            self.device = str(tensor.device)
            if tensor.nbytes <= ALWAYS_HELD_BYTES and keep in (Keep.NO, Keep.REFERENCE):
                keep = Keep.SMALL
            held = tensor.detach() if keep is Keep.REFERENCE else None
            self._raw[name] = _Raw(digest, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), keep, held)
            if keep not in (Keep.NO, Keep.REFERENCE):
                wanted.setdefault(keep, {})[name] = tensor
        for keep, tensors in wanted.items():
            self.copies[keep] = copies = make_copies(tensors, on_device=keep is not Keep.DRAM)
            for name, copy in copies.made.items():
                self._raw[name].held = copy

    def names(self) -> tuple[str, ...]:
        """All names, in order."""
        return tuple(self._raw)

    def digests(self) -> Mapping[str, str]:
        """The digest of each tensor as it was loaded."""
        return {name: raw.digest for name, raw in self._raw.items()}

    def held(self) -> dict[str, torch.Tensor]:
        """The tensors that are held, as they were loaded."""
        return {name: raw.held for name, raw in self._raw.items() if raw.held is not None}

    def settle(self, model: torch.nn.Module) -> Settled:
        """Look at the post-processed `model` and sort every raw tensor; originals no longer needed are let go."""
        now = named_raw_tensors(model)
        settled = Settled()
        for name, raw in self._raw.items():
            current = now.get(name)
            settled.contents[name] = (raw.digest, raw.stride)
            held, raw.held = raw.held, None
            if current is not None and _is_still(raw, current):
                settled.live[name] = weakref.ref(current)
            elif held is not None and digest_of(held) == raw.digest:
                settled.kept[name] = held
                settled.reasons[name] = raw.keep
            elif held is not None:
                settled.lost[name] = "vLLM rewrote it in place"
            elif raw.keep not in (Keep.NO, Keep.REFERENCE):
                settled.lost[name] = "vLLM rewrote it, and there was no memory for a copy"
            else:
                settled.lost[name] = "vLLM dropped it" if current is None else "vLLM replaced it"
        self.copies.clear()
        return settled


def _is_still(raw: _Raw, current: torch.Tensor) -> bool:
    """Whether it holds what it held, in the same order; on tiles of a device's own format, too: see `Memory`."""
    return (
        current.dtype == raw.dtype
        and tuple(current.shape) == raw.shape
        and tuple(current.stride()) == raw.stride
        and digest_of(current) == raw.digest
    )
