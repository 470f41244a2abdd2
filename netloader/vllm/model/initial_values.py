"""Values that tensors had when the model was built, for putting them back after a pull that broke.

The default loader writes what the checkpoint has. Some tensors are in no checkpoint (key and value scales, zero
points) and must keep the value that they were built with, which a broken pull may have overwritten.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netloader.errors import NetloaderError

if TYPE_CHECKING:
    import torch

__all__ = ["InitialValues", "NotRestored", "bits_of"]

READ_WHOLE_BYTES = 4 << 20
COPY_BUDGET_BYTES = 256 << 20
_SAMPLES = 64
_SAMPLE_ITEMS = 1024
_MARK = 1


class NotRestored(NetloaderError):
    """The default loader left tensors alone whose built value is not known any more.

    Attributes:
        names: The tensors.
    """

    def __init__(self, names: list[str]) -> None:
        super().__init__(
            f"after the broken pull the default loader did not fill {', '.join(names[:5])}",
            hint="start again without SOURCE: this model builds values that can't be put back after a pull",
        )
        self.names = tuple(names)


@dataclass
class _Fresh:
    tensor: torch.Tensor
    copy: torch.Tensor | None = None  # the whole value, or a single element when all are equal
    unknown: bool = False


class InitialValues:
    """What the tensors hold before a pull begins.

    A tensor whose elements are all equal is remembered by one of them, other small ones are copied. A large tensor
    with mixed contents is memory that nobody has written yet; it is remembered as unknown, since copying all of those
    would double the memory a load takes. A large tensor is judged by samples.

    Args:
        tensors: What the pull may touch, by name.
        filled: Names of those that were filled when the model was built, which no loader does again: copied whatever
            their size.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], filled: Collection[str] = frozenset()) -> None:
        self._fresh: dict[str, _Fresh] = {}
        self._budget = COPY_BUDGET_BYTES
        seen: set[int] = set()
        for name, tensor in tensors.items():
            if id(tensor) not in seen and tensor.numel():
                seen.add(id(tensor))
                self._fresh[name] = self._remember(tensor.detach(), whole=name in filled)

    def _remember(self, tensor: torch.Tensor, *, whole: bool) -> _Fresh:
        if whole:
            return _Fresh(tensor, copy=tensor.clone())
        if _is_uniform(tensor):
            return _Fresh(tensor, copy=_first(tensor).clone())
        if tensor.nbytes <= min(READ_WHOLE_BYTES, self._budget):
            self._budget -= tensor.nbytes
            return _Fresh(tensor, copy=tensor.clone())
        return _Fresh(tensor, unknown=True)

    def restore(self) -> None:
        """Put every value back; those that are unknown become zero, but for a mark in their first element.

        The mark is the smallest pattern of bits: as a number it is as good as zero, should a loader leave out the first
        element alone. A checkpoint that is zero all over takes the mark away, and nothing else tells it from a tensor
        that was left alone.
        """
        import torch

        with torch.no_grad():
            for fresh in self._fresh.values():
                if fresh.copy is None:
                    bits = bits_of(fresh.tensor)
                    bits.zero_()
                    _first(bits).fill_(_MARK)
                else:
                    # Bit for bit: a copy through floating point may change the bits of a NaN.
                    bits_of(fresh.tensor).copy_(bits_of(fresh.copy).expand_as(bits_of(fresh.tensor)))

    def check_filled(self) -> None:
        """Check, after the default loader ran, that no tensor of unknown value was left out.

        Raises:
            NotRestored: At least one is still as `restore` left it.
        """
        left = [name for name, fresh in self._fresh.items() if fresh.unknown and _is_marked(fresh.tensor)]
        if left:
            raise NotRestored(left)


def _is_uniform(tensor: torch.Tensor) -> bool:
    bits = bits_of(tensor)
    first = _first(bits)
    if tensor.nbytes <= READ_WHOLE_BYTES:
        return bool((bits == first).all())
    flat = bits.reshape(-1) if bits.is_contiguous() else bits.flatten()
    step = max(1, (flat.numel() - _SAMPLE_ITEMS) // (_SAMPLES - 1))
    return all(bool((flat[at : at + _SAMPLE_ITEMS] == first).all()) for at in range(0, flat.numel(), step))


def _is_marked(tensor: torch.Tensor) -> bool:
    """Whether it is as :meth:`InitialValues.restore` leaves what is unknown: zero after the mark."""
    bits = bits_of(tensor)
    return int(_first(bits)) == _MARK and int(bits.count_nonzero()) == 1


def _first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[(0,) * tensor.dim()]


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the same size: equality and copies by bits, for every dtype."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    size = tensor.element_size()
    # A complex number of 16 bytes has no integer of its size; its two halves do.
    return tensor.view(integers[size]) if size in integers else torch.view_as_real(tensor).view(torch.int64)
