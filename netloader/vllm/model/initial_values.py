"""Initial values of tensors, which are restored after a failed pull.

The default loader writes only tensors that the checkpoint has. Some tensors are in no checkpoint (key and value scales,
zero points). They must keep the values that the constructor gave them, and a failed pull may have overwritten those.
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
    """The default loader did not fill tensors whose initial values are not known.

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
class _Initial:
    tensor: torch.Tensor
    copy: torch.Tensor | None = None  # all elements, or a single one when all are equal
    unknown: bool = False


class InitialValues:
    """The values of tensors before a pull begins.

    Of a tensor whose elements are all equal, one element is saved. Other small tensors are copied. A large tensor with
    different elements usually is uninitialised memory. Its value counts as unknown, because copies of all such tensors
    would double the memory of a load.

    In a large tensor, only samples of the elements are compared. Comparing all of them would read the whole model once
    more before each pull, which takes seconds on a CPU, for a tensor that would have to be large, in no checkpoint,
    persistent, built with different elements, and equal in all samples. Its value matters only after a pull has failed.

    Args:
        tensors: The tensors that the pull may write, by name.
        filled: Names of tensors that the constructor filled from files. No loader does that again, so these are copied
            whatever their size.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], filled: Collection[str] = frozenset()) -> None:
        self._initial: dict[str, _Initial] = {}
        self._budget = COPY_BUDGET_BYTES
        seen: set[int] = set()
        for name, tensor in tensors.items():
            if id(tensor) not in seen and tensor.numel():
                seen.add(id(tensor))
                self._initial[name] = self._remember(tensor.detach(), whole=name in filled)

    def _remember(self, tensor: torch.Tensor, *, whole: bool) -> _Initial:
        if whole:
            return _Initial(tensor, copy=tensor.clone())
        if _is_uniform(tensor):
            return _Initial(tensor, copy=_first(tensor).clone())
        if tensor.nbytes <= min(READ_WHOLE_BYTES, self._budget):
            self._budget -= tensor.nbytes
            return _Initial(tensor, copy=tensor.clone())
        return _Initial(tensor, unknown=True)

    def restore(self) -> None:
        """Restore all values. A tensor of unknown value becomes zero, except a mark in its first element.

        The mark is the bit pattern 1, which is next to zero in every floating-point dtype. A loader that fills the
        tensor overwrites the mark, also if all values in the checkpoint are zero. So `check_filled` can distinguish
        such a tensor from one that no loader has filled.
        """
        import torch

        with torch.no_grad():
            for fresh in self._initial.values():
                if fresh.copy is None:
                    bits = bits_of(fresh.tensor)
                    bits.zero_()
                    _first(bits).fill_(_MARK)
                else:
                    # The bits are copied, because a floating-point copy may change the bits of a NaN.
                    bits_of(fresh.tensor).copy_(bits_of(fresh.copy).expand_as(bits_of(fresh.tensor)))

    def check_filled(self) -> None:
        """Check, after the default loader ran, that it has filled every tensor of unknown value.

        Raises:
            NotRestored: A tensor still is as `restore` left it.
        """
        left = [name for name, fresh in self._initial.items() if fresh.unknown and _is_marked(fresh.tensor)]
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
    """Whether the tensor still is as :meth:`InitialValues.restore` leaves one of unknown value."""
    bits = bits_of(tensor)
    return int(_first(bits)) == _MARK and int(bits.count_nonzero()) == 1


def _first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[(0,) * tensor.dim()]


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """A view of the memory as integers of the same size, to compare and copy bits of any dtype."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    size = tensor.element_size()
    # There is no integer of 16 bytes for the larger complex dtype, so its two halves are viewed.
    return tensor.view(integers[size]) if size in integers else torch.view_as_real(tensor).view(torch.int64)
