"""The tensors that a client fills: given ones, or new ones allocated for the announced manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from netloader.core.manifest import Manifest, TensorSpec
from netloader.core.plan import Plan
from netloader.errors import LocalProtocolError, ManifestError
from netloader.tensors.describe import DTYPES, describe
from netloader.tensors.memory import MemoryBlock, TensorMemory

__all__ = ["Destination", "destination"]


Allocate = Callable[[Manifest, Mapping[str, str] | None], Mapping[str, torch.Tensor]]
"""Makes the tensors of a manifest; the metadata of the weight files comes with it, if the source states it."""


class Destination:
    """The tensors that a client fills. Made by :func:`destination`.

    Args:
        device: As below.
        allocate: Makes the tensors for an announced manifest; by default they are new ones on `device`.

    Attributes:
        device: Device of the tensors, also of those not allocated yet, as torch names it.
    """

    def __init__(self, device: str, allocate: Allocate | None = None) -> None:
        self.device = device
        self._allocate = allocate or self._new
        self._manifest: Manifest | None = None
        self._memory: TensorMemory | None = None
        self._tensors: Mapping[str, torch.Tensor] = {}

    @classmethod
    def over(cls, tensors: Mapping[str, torch.Tensor]) -> Destination:
        """A destination that fills `tensors`; see :func:`destination`."""
        manifest, memory = describe(tensors, writable=True)
        made = cls(memory.device)
        made._manifest, made._memory, made._tensors = manifest, memory, dict(tensors)
        return made

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of the tensors; None until :meth:`adopt` if no tensors were given."""
        return self._manifest

    @property
    def memory(self) -> TensorMemory:
        """The memory of the tensors.

        Raises:
            LocalProtocolError: No tensors were given, and no manifest was adopted yet.
        """
        if self._memory is None:
            raise LocalProtocolError("the destination has no memory yet: no manifest was adopted")
        return self._memory

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors by name, in the order of the manifest; an alias maps to the same tensor as its owner."""
        return self._tensors

    def larger(self, least: int) -> list[torch.Tensor]:
        """The tensors of at least `least` bytes; a tensor with several names once."""
        sizes = () if self._manifest is None else self._manifest.sizes
        if max(sizes, default=0) < least:
            return []
        return [tensor for tensor, nbytes in zip(self._tensors.values(), sizes, strict=True) if nbytes >= least]

    def adopt(self, manifest: Manifest, metadata: Mapping[str, str] | None = None) -> None:
        """Allocate memory for a manifest that the server announced. Its contents are undefined until it is filled.

        Args:
            manifest: A manifest that passed :meth:`~netloader.core.manifest.Manifest.check`.
            metadata: Metadata of the weight files at the server; None when it is not stated.

        Raises:
            LocalProtocolError: The destination has tensors already.
            ManifestError: Some tensors can't exist here: a dtype that this torch lacks, a device memory format, or not
                enough memory.
        """
        if self._manifest is not None:
            raise LocalProtocolError("the destination has tensors already, it can't adopt a manifest")
        problems = [f"{spec.name}: {reason}" for spec in manifest.tensors if (reason := _impossible(spec))]
        if problems:
            raise ManifestError(f"{len(problems)} tensors of the server cannot exist here", problems=problems)
        tensors = self._allocate(manifest, metadata)
        self._memory = TensorMemory(manifest, list(tensors.values()), torch.device(self.device))
        self._tensors = tensors
        self._manifest = manifest

    def _new(self, manifest: Manifest, _: Mapping[str, str] | None) -> dict[str, torch.Tensor]:
        """New tensors."""
        tensors: dict[str, torch.Tensor] = {}
        for spec in manifest.tensors:
            if spec.alias_of:
                tensors[spec.name] = tensors[spec.alias_of]
                continue
            try:
                tensors[spec.name] = self._empty(spec)
            except (RuntimeError, MemoryError) as error:
                raise ManifestError(
                    f"no memory on {self.device} for {spec.name} ({spec.nbytes} of {manifest.nbytes} bytes in all)",
                    hint="free memory, or pull on a larger host",
                ) from error
        return tensors

    def weaken(self) -> None:
        """Hold the tensors by weak references from now on; see :meth:`~netloader.tensors.TensorMemory.weaken`."""
        self._tensors = {}
        if self._memory is not None:
            self._memory.weaken()

    def free(self) -> None:
        """Free what :meth:`adopt` allocated, because the announcement is not pulled after all."""
        self._memory, self._tensors, self._manifest = None, {}, None

    def views(self, plan: Plan, numbers: Sequence[int]) -> list[MemoryBlock]:
        """Views of these blocks, in this order; see :meth:`~netloader.tensors.TensorMemory.views`."""
        return self.memory.views(plan, numbers)

    def _empty(self, spec: TensorSpec) -> torch.Tensor:
        dtype = DTYPES[spec.dtype]
        if spec.stride:
            return torch.empty_strided(spec.shape, spec.stride, dtype=dtype, device=self.device)
        return torch.empty(spec.shape, dtype=dtype, device=self.device)


def destination(
    tensors: Mapping[str, torch.Tensor] | None, *, device: str = "cpu", allocate: Allocate | None = None
) -> Destination:
    """Make the destination of a pull.

    Args:
        tensors: Tensors to fill in place, by full name; None to allocate what the server announces.
        device: Device for the allocation; not used when `tensors` are given.
        allocate: Makes the tensors instead, on `device`.

    Raises:
        ManifestError: Some tensors cannot be described or written to; each is named with its reason.
    """
    if tensors is not None:
        return Destination.over(tensors)
    return Destination(str(torch.empty(0, device=device).device), allocate)


def _impossible(spec: TensorSpec) -> str:
    if spec.dtype not in DTYPES:
        return f"torch {torch.__version__} has no dtype {spec.dtype}"
    if spec.format != "nd":
        return f"memory format {spec.format} can't be allocated without its device"
    return ""
