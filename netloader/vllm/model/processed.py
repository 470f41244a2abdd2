"""A post-processed model: all tensors by name, all plain values, and the objects that can't be compared.

vLLM's flag `supports_pre_processed_weights` is a statement about a method's code. It does not say what a layer holds:
on a CPU, a method may keep its weights in a handle or in a closure although the flag is set. So this module examines
every object that the modules hold. An object that is neither a tensor with a name nor a plain value is reported as a
problem, and then the processed layout is not offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from netloader.errors import NetloaderError
from netloader.vllm.model.object_walk import Survey, Walk, handle_problem, walked
from netloader.vllm.model.post_processing import contract
from netloader.vllm.model.registered import is_expert_map

if TYPE_CHECKING:
    import torch

    from netloader.core.identity import ModelIdentity
    from netloader.core.protocol.events import Announcement
    from netloader.tensors import TensorMemory

__all__ = ["FACTS", "ProcessedHolding", "fact_names", "hold_processed", "survey"]

FACTS = "netloader.plain_state"
"""Name of the tensor with the digests of all plain values: one digest per value, in the order of their names."""

_DIGEST_BYTES = 16
_SMALL = 4096


@dataclass(frozen=True)
class ProcessedHolding:
    """Processed tensors that can be served. Of these, only the tensor of plain values is kept alive here.

    Attributes:
        announcement: Its announcement, with the digests after post-processing.
        memory: Its blocks. It has weak references to the tensors.
        facts: The tensor with the digests of the plain values.
    """

    announcement: Announcement
    memory: TensorMemory
    facts: torch.Tensor

    @property
    def device(self) -> str:
        """The device of its tensors, as torch names it."""
        return self.memory.device


def survey(model: torch.nn.Module, raw_bytes: Mapping[str, int]) -> Survey:
    """Examine everything that the modules of a post-processed model hold.

    Args:
        model: The model.
        raw_bytes: Size of each parameter and buffer before post-processing. One that is empty now is a problem, because
            its contents are kept elsewhere.
    """
    walk = walked(model)
    found = walk.found
    found.problems += _emptied(walk, raw_bytes)
    found.problems += _in_tensors(walk)
    _separate_views(walk)
    found.tensors[FACTS] = _facts_tensor(found.facts, next(iter(found.tensors.values())).device)
    return found


def fact_names(facts: Mapping[str, str], ours: torch.Tensor, theirs: torch.Tensor) -> list[str]:
    """Names of the plain values whose digests differ between two tensors of equal shape."""
    rows = (ours.cpu() != theirs.cpu()).any(dim=1).tolist()
    return [name for name, differs in zip(sorted(facts), rows, strict=True) if differs]


def _in_tensors(walk: Walk) -> list[str]:
    """Problems with numbers that are addresses in a tensor. A device's memory may be mapped nowhere in this process."""
    if not walk.numbers:
        return []
    tensors = [tensor for tensor in [*walk.named.values(), *(t for _, t in walk.hidden)] if tensor.numel()]
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    spans = {range(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages}
    return [handle_problem(name, value) for name, value in walk.numbers.items() if any(value in span for span in spans)]


def _emptied(walk: Walk, raw_bytes: Mapping[str, int]) -> list[str]:
    return [
        f"{name}: it had {raw_bytes[name]} bytes, and is empty now: they are somewhere else"
        for name in sorted(walk.empty)
        if raw_bytes.get(name)
    ]


def _separate_views(walk: Walk) -> None:
    """Separate the named tensors into tensors to transfer, and views of those and expert maps, which are facts.

    Check closures too.
    """
    from netloader.vllm.model.digest import digest_of

    found = walk.found
    owners: dict[int, tuple[str, torch.Tensor]] = {}  # by storage: its largest tensor
    home = next((t.device for t in walk.named.values() if t.numel()), None)
    for name, tensor in walk.named.items():
        if tensor.numel() and tensor.device == home:
            key = tensor.untyped_storage().data_ptr()
            if key not in owners or owners[key][1].nbytes < tensor.nbytes:
                owners[key] = (name, tensor)
    for name, tensor in walk.named.items():
        if is_expert_map(name.rpartition(".")[2], tensor):
            found.facts[name] = f"map {digest_of(tensor)}"  # it follows from the configuration
            continue
        if home is not None and tensor.device != home:
            _elsewhere(found, name, tensor)
            continue
        owner, whole = (
            owners.get(tensor.untyped_storage().data_ptr(), (name, tensor)) if tensor.numel() else ("", tensor)
        )
        if not tensor.numel() or _same(tensor, whole) or not _inside(tensor, whole):
            found.tensors[name] = tensor
        else:
            offset = tensor.data_ptr() - whole.data_ptr()
            found.facts[name] = f"view of {owner} at {offset}: {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}"
    for name, tensor in walk.hidden:
        known = tensor.numel() and tensor.untyped_storage().data_ptr() in owners
        if tensor.numel() and not known:
            found.problems.append(f"{name}: a function keeps a tensor of {tensor.nbytes} bytes that has no other name")


def _elsewhere(found: Survey, name: str, tensor: torch.Tensor) -> None:
    from netloader.vllm.model.digest import digest_of

    if not tensor.numel():  # a placeholder without contents to transfer
        found.facts[name] = f"{tensor.device.type} empty {tensor.dtype} {tuple(tensor.shape)}"
    elif tensor.is_meta or tensor.nbytes > _SMALL:
        found.problems.append(f"{name}: it is on {tensor.device}, apart from the other tensors")
    else:
        found.facts[name] = f"{tensor.device.type} {digest_of(tensor)}"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())


def _inside(tensor: torch.Tensor, whole: torch.Tensor) -> bool:
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    end = tensor.data_ptr() + (last + 1) * tensor.element_size()
    return whole.data_ptr() <= tensor.data_ptr() and end <= whole.data_ptr() + whole.nbytes


def _facts_tensor(facts: Mapping[str, str], device: torch.device) -> torch.Tensor:
    import torch
    import xxhash

    rows = b"".join(xxhash.xxh3_128(f"{name}\0{facts[name]}".encode()).digest() for name in sorted(facts))
    flat = torch.frombuffer(bytearray(rows or bytes(_DIGEST_BYTES)), dtype=torch.uint8)
    return flat.reshape(-1, _DIGEST_BYTES).to(device)


def hold_processed(
    model: torch.nn.Module, identity: ModelIdentity, raw_bytes: Mapping[str, int]
) -> tuple[ProcessedHolding | None, str]:
    """The holding of a post-processed model, or the reason why it can't be served exactly.

    Args:
        model: The model.
        identity: The identity of its raw weights.
        raw_bytes: See :func:`survey`.
    """
    from netloader.tensors import hold

    known, why_not = contract()
    if known is None:
        return None, why_not
    emptied = known.emptied(model)
    found = survey(model, {name: size for name, size in raw_bytes.items() if name not in emptied})
    problems = [*known.unknown(model), *known.undeclared(model), *found.problems]
    if problems:
        more = f" and {len(problems) - 2} more" if len(problems) > 2 else ""  # noqa: PLR2004 - two fit into a line
        return None, "; ".join(problems[:2]) + more
    try:
        held = hold(found.tensors, msgspec.structs.replace(identity, layout="processed"), weak=True)
    except NetloaderError as error:
        return None, str(error)
    return ProcessedHolding(held.announcement, held.memory, found.tensors[FACTS]), ""
