"""Which tensors a model reads from files while it is built, and whether all of them became weights that have a name.

Some constructors read a file themselves, before vLLM calls `load_weights` (the Dense projector of an embedding model).
A constructor may do anything with such a tensor. So each tensor that it read must be found among the named tensors. If
one is not found, the model is refused, and the refusal names the tensor.
"""

from __future__ import annotations

import functools
import gc
import io
import logging
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from netloader.vllm.load.file_opens import FileOpens, content_digest
from netloader.vllm.model.digest import digest_of

if TYPE_CHECKING:
    import torch

__all__ = ["FileReads", "Traced"]

log = logging.getLogger(__name__)

_PLAIN = (bool, int, float, str, bytes, complex, type(None))


@dataclass(frozen=True)
class _Read:
    name: str
    shape: tuple[int, ...] = ()
    digests: frozenset[str] = frozenset()
    """Digests of the tensor in its dtype, and in each floating-point dtype to which a model may convert it. Empty if it
    is not a tensor."""
    tensor: Callable[[], torch.Tensor | None] = lambda: None


@dataclass(frozen=True)
class Traced:
    """Where the tensors are that a constructor read.

    Attributes:
        filled: Names of the weights that hold tensors that were read.
        lost: Names of tensors that were read and that no weight holds, or that are also kept elsewhere; in the order
            of reading.
    """

    filled: frozenset[str] = frozenset()
    lost: tuple[str, ...] = ()


class FileReads:
    """Records what safetensors and `torch.load` read, from entering the context until `stop` or its end.

    Modules import these functions under names of their own. So a recording wrapper replaces each function in every
    module that has it. `stop` restores the originals in every module, also in modules that were imported meanwhile.
    Files that are read in another way are recorded by their names.

    Args:
        folder: The folder of the model; None if it is not on this host.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._reads: list[_Read] = []
        self._opens = FileOpens(folder)
        self._paths: set[str] = set()
        self._contents: Counter[bytes] = Counter()
        self._wrapped: list[tuple[object, object]] = []  # each original function, and its wrapper

    def __enter__(self) -> Self:
        import safetensors.torch
        import torch

        self._wrapped = [
            (safetensors.safe_open, functools.partial(_Opened, safetensors.safe_open, self._note, self._record)),
            (safetensors.torch.load, self._recording(safetensors.torch.load)),
            (torch.load, self._recording(torch.load)),
        ]
        _replace(self._wrapped)
        self._opens.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the recording: the model is built, and its constructor reads nothing more."""
        self._opens.stop()
        wrapped, self._wrapped = self._wrapped, []
        if wrapped:
            _replace([(wrapper, original) for original, wrapper in wrapped])

    def _recording(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load(*arguments: Any, **options: Any) -> Any:
            source = arguments[0] if arguments else next(iter(options.values()), "")
            self._note(source)
            found = original(*arguments, **options)
            self._record(_named_source(source), found)
            return found

        return load

    def _note(self, source: object) -> None:
        """Note which file the tensors of a read come from, before it reads the source to its end."""
        if not self._wrapped:
            return
        path = _named_source(source) or _named_source(getattr(source, "name", ""))
        if path:
            self._paths.add(path)
        elif isinstance(source, bytes | bytearray | memoryview):
            self._contents[content_digest(memoryview(source))] += 1
        elif isinstance(source, io.BytesIO):
            self._contents[content_digest(source.getbuffer())] += 1

    def _record(self, source: str, found: Any) -> None:
        if not self._wrapped:
            return
        try:
            self._reads += list(_reads(source, found, set()))
        except Exception as error:  # noqa: BLE001 - any tensor may be read; the model is then refused, and still loads
            log.warning("netloader: what the model reads from %s cannot be compared: %s", source or "a file", error)
            self._reads.append(_Read(source or "a file"))

    def traced(self, tensors: Mapping[str, torch.Tensor]) -> Traced:
        """Search the weights of the built model for each tensor that was read.

        A tensor is found if a weight has the same shape and contents, in any floating-point dtype. A tensor that the
        constructor sliced, transposed, computed with or did not use is not found.

        Args:
            tensors: The weights, before anything else fills them.
        """
        others = tuple(
            f"{path} (read by other means than safetensors and torch.load)"
            for path in self._opens.unexplained(self._paths, self._contents)
        )
        if not self._reads:
            return Traced(lost=others)
        from torch.nn.parameter import is_lazy

        gc.collect()  # so that only tensors that the model still refers to are alive
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
            (*dict.fromkeys(read.name for read in self._reads if is_lost(read)), *others),
        )


class _Opened:
    """A file opened by `safe_open`. It records each tensor that is read from it."""

    def __init__(
        self,
        original: Any,
        note: Callable[[object], None],
        record: Callable[[str, Any], None],
        *arguments: Any,
        **options: Any,
    ) -> None:
        self._file = original(*arguments, **options)
        self._source = _named_source(arguments[0] if arguments else options.get("filename", ""))
        self._record = record
        note(self._source)

    def __getattr__(self, name: str) -> Any:
        # All methods are wrapped, because releases of safetensors have different ones.
        method = getattr(self._file, name)

        def call(*arguments: Any, **options: Any) -> Any:
            found = method(*arguments, **options)
            self._record(self._source, {arguments[0]: found} if arguments else found)
            return found

        return call if callable(method) else method

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._file.get_slice(name), lambda found: self._record(self._source, {name: found}))


class _Slice:
    def __init__(self, original: Any, record: Callable[[Any], None]) -> None:
        self._slice = original
        self._record = record

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slice, name)

    def __getitem__(self, key: Any) -> Any:
        found = self._slice[key]
        self._record(found)
        return found


def _named_source(source: object) -> str:
    return str(source) if isinstance(source, str) or hasattr(source, "__fspath__") else ""


def _reads(name: str, found: Any, seen: set[int]) -> Iterator[_Read]:
    """Every tensor in the result of a read. An object of any other type counts as one read that no weight can hold."""
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
    """Replace the first of each pair by the second in the namespace of every module."""
    by_id = {id(old): new for old, new in pairs}
    for module in list(sys.modules.values()):
        namespace = getattr(module, "__dict__", None)
        if isinstance(namespace, dict):
            for name, value in list(namespace.items()):
                if id(value) in by_id:
                    namespace[name] = by_id[id(value)]
