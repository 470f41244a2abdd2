"""Which tensors a model reads from files while it is built, and whether all of them became weights that have a name.

Some models do not wait for `load_weights`: a constructor reads a file of its own (the Dense projector of an embedding
model). What it does with that is its own affair, so nothing is assumed: whatever was read has to be found again among
the named tensors, or the model is refused by the name of what was read.
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from netloader.vllm.model.digest import digest_of

if TYPE_CHECKING:
    import torch

__all__ = ["FileReads", "Traced"]

_PLAIN = (bool, int, float, str, bytes, complex, type(None))


@dataclass(frozen=True)
class _Read:
    name: str
    shape: tuple[int, ...] = ()
    digests: frozenset[str] = frozenset()
    """Of the tensor as it was read and in the floating-point types that a model may keep it in; empty for no tensor."""
    tensor: Callable[[], torch.Tensor | None] = lambda: None


@dataclass(frozen=True)
class Traced:
    """What became of all that was read.

    Attributes:
        filled: Names of the weights that hold some of it.
        lost: Names of what was read and is not, or not only, in a weight; in the order of reading.
    """

    filled: frozenset[str] = frozenset()
    lost: tuple[str, ...] = ()


class FileReads:
    """Watches what is read by safetensors and by `torch.load`, from entering until `stop` or leaving.

    Both are reached under many names, since modules import them one by one; each is replaced wherever a module has it,
    and put back in the same way, also in modules that were imported meanwhile.
    """

    def __init__(self) -> None:
        self._reads: list[_Read] = []
        self._watching: list[tuple[object, object]] = []  # the original, and what stands for it

    def __enter__(self) -> Self:
        import safetensors.torch
        import torch

        self._watching = [
            (safetensors.safe_open, functools.partial(_Opened, safetensors.safe_open, self._saw)),
            (safetensors.torch.load, self._watched(safetensors.torch.load)),
            (torch.load, self._watched(torch.load)),
        ]
        _replace(self._watching)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """The model is built: what is read from now on is no business of its constructor."""
        watching, self._watching = self._watching, []
        if watching:
            _replace([(ours, original) for original, ours in watching])

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load(*arguments: Any, **options: Any) -> Any:
            found = original(*arguments, **options)
            self._saw(_named_source(arguments[0] if arguments else next(iter(options.values()), "")), found)
            return found

        return load

    def _saw(self, source: str, found: Any) -> None:
        if self._watching:
            self._reads += _reads(source, found, set())

    def traced(self, tensors: Mapping[str, torch.Tensor]) -> Traced:
        """Look for all that was read among the weights of the model that was built.

        Equal contents in the same shape count as found, in any floating-point type. What a constructor has cut,
        transposed or computed with is not found, nor what it read for nothing.

        Args:
            tensors: The weights, before anything else fills them.
        """
        if not self._reads:
            return Traced()
        from torch.nn.parameter import is_lazy

        gc.collect()  # what nothing refers to any more is not kept anywhere
        shapes = {read.shape for read in self._reads if read.digests}
        ours = {n: t for n, t in tensors.items() if not (t.is_meta or is_lazy(t)) and tuple(t.shape) in shapes}
        held = {name: digest_of(tensor) for name, tensor in ours.items()}
        storages = {tensor.untyped_storage().data_ptr() for tensor in ours.values()}

        def is_lost(read: _Read) -> bool:
            alive = read.tensor()
            kept = alive is not None and bool(alive.numel()) and alive.untyped_storage().data_ptr() not in storages
            return kept or not read.digests & set(held.values())

        known = frozenset[str]().union(*(read.digests for read in self._reads))
        return Traced(
            frozenset(name for name, digest in held.items() if digest in known),
            tuple(dict.fromkeys(read.name for read in self._reads if is_lost(read))),
        )


class _Opened:
    """A file opened by `safe_open`, whose tensors are noted as they are read."""

    def __init__(self, original: Any, saw: Callable[[str, Any], None], *arguments: Any, **options: Any) -> None:
        self._file = original(*arguments, **options)
        self._source = _named_source(arguments[0] if arguments else options.get("filename", ""))
        self._saw = saw

    def __getattr__(self, name: str) -> Any:
        # Every method, since releases of safetensors differ in which there are.
        method = getattr(self._file, name)

        def call(*arguments: Any, **options: Any) -> Any:
            found = method(*arguments, **options)
            self._saw(self._source, {arguments[0]: found} if arguments else found)
            return found

        return call if callable(method) else method

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._file.get_slice(name), lambda found: self._saw(self._source, {name: found}))


class _Slice:
    def __init__(self, original: Any, saw: Callable[[Any], None]) -> None:
        self._slice = original
        self._saw = saw

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slice, name)

    def __getitem__(self, key: Any) -> Any:
        found = self._slice[key]
        self._saw(found)
        return found


def _named_source(source: object) -> str:
    return str(source) if isinstance(source, str) or hasattr(source, "__fspath__") else ""


def _reads(name: str, found: Any, seen: set[int]) -> Iterator[_Read]:
    """Every tensor in what a read gave; what can't be looked into counts as one read that is never found again."""
    import torch

    if isinstance(found, torch.Tensor):
        yield _Read(name, tuple(found.shape), frozenset(_digests(found)), weakref.ref(found))
    elif isinstance(found, Mapping | list | tuple):
        if id(found) not in seen:
            seen.add(id(found))
            parts = found.items() if isinstance(found, Mapping) else enumerate(found)
            for key, part in parts:
                yield from _reads(f"{name}: {key}" if name else str(key), part, seen)
    elif not isinstance(found, (*_PLAIN, torch.dtype, torch.Size)):
        yield _Read(f"{name} ({type(found).__name__})")


def _digests(tensor: torch.Tensor) -> Iterator[str]:
    import torch

    if tensor.is_meta:
        return
    yield digest_of(tensor)
    if tensor.is_floating_point():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield digest_of(tensor.to(dtype))


def _replace(pairs: list[tuple[Any, Any]]) -> None:
    """Put the second of each pair wherever a module has the first."""
    by_id = {id(old): new for old, new in pairs}
    for module in list(sys.modules.values()):
        namespace = getattr(module, "__dict__", None)
        if isinstance(namespace, dict):
            for name, value in list(namespace.items()):
                if id(value) in by_id:
                    namespace[name] = by_id[id(value)]
