"""Which files a model opens while it is built, beside those that safetensors and `torch.load` read.

A constructor may read weights in any way: `numpy.load`, `numpy.fromfile`, `pickle`, `open` and its own parser. What
such code makes of the bytes can't be followed. So every file that it opened must be one that holds no weights, one of
the checkpoint's own weight files, or one whose contents were seen as tensors. An audit hook of Python sees every file
that Python code opens, whatever function opens it. A library in C that opens files itself is not seen.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections import Counter
from pathlib import Path

import xxhash

from netloader.checkpoint.fingerprint import weight_files_of

__all__ = ["FileOpens", "content_digest"]

_NO_WEIGHTS = frozenset(
    {
        *(".json", ".jsonl", ".txt", ".md", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".jinja", ".jinja2", ".lock"),
        *(".model", ".spm", ".tiktoken", ".vocab", ".bpe", ".codes"),
        *(".py", ".pyc", ".so", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp"),
    }
)
"""Suffixes of files in a model's folder that hold configuration, vocabulary or code."""

_WEIGHTS = frozenset({".safetensors", ".gguf", ".npy", ".npz", ".pt", ".ckpt", ".h5", ".hdf5"})
"""Suffixes of files that hold tensors, wherever they are. Others (`.bin`, `.pkl`) also name caches of compilers."""

_CHUNK = 1 << 20


def content_digest(data: bytes | memoryview) -> bytes:
    """A digest by which the contents of a file are recognised."""
    return xxhash.xxh3_128(data).digest()


class FileOpens:
    """Records the files that this process opens to read them, from `start` until `stop`.

    All recordings share one audit hook, which stays. While there is no recording, it only compares two values.

    Args:
        folder: The folder of the model; None if it is not on this host.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._opened: dict[str, None] = {}  # an ordered set

    def start(self) -> None:
        """Begin to record."""
        _hook().begin(self._opened)

    def stop(self) -> None:
        """End the recording. A second call changes nothing."""
        _hook().end(self._opened)

    def unexplained(self, paths: set[str], contents: Counter[bytes]) -> list[str]:
        """The files that may hold weights, and whose contents were not seen as tensors.

        Args:
            paths: Paths that safetensors and `torch.load` have read.
            contents: Digests of contents that they were given as bytes, and how often.
        """
        of_model, own = self._files_of_model()
        seen = {_real(path) for path in paths} | own
        left, found = Counter(contents), list[str]()
        for opened in tuple(self._opened):
            real = _real(opened)
            name = of_model.get(real)
            suspect = Path(opened).suffix in _WEIGHTS if name is None else name.suffix not in _NO_WEIGHTS
            if real in seen or not suspect:
                continue
            seen.add(real)
            digest = _digest_of_file(real) if left else b""
            if left[digest] > 0:
                left[digest] -= 1
            else:
                found.append(str(name or opened))
        return found

    def _files_of_model(self) -> tuple[dict[Path, Path], set[Path]]:
        """The files in the model's folder by their real path, and the real paths of its checkpoint.

        The default loader reads the checkpoint, and the fingerprint covers it. Files of a snapshot are links to files
        without a suffix.
        """
        folder = self._folder
        if folder is None or not folder.is_dir():
            return {}, set()
        files = {_real(path): path for path in folder.rglob("*") if path.is_file()}
        return files, {_real(path) for path in weight_files_of(folder)}


class _Hook:
    """The audit hook of this process. It adds the path of each file that is opened to all running recordings."""

    def __init__(self) -> None:
        self._into: tuple[dict[str, None], ...] = ()
        self._lock = threading.Lock()
        sys.addaudithook(self._observe)

    def begin(self, opened: dict[str, None]) -> None:
        """Record into `opened`, until :meth:`end`."""
        with self._lock:
            self._into = (*self._into, opened)

    def end(self, opened: dict[str, None]) -> None:
        """Record no longer into `opened`. A second call changes nothing."""
        with self._lock:
            self._into = tuple(other for other in self._into if other is not opened)

    def _observe(self, event: str, arguments: tuple[object, ...]) -> None:
        if event != "open":
            return
        for opened in self._into:  # a tuple, because another thread may begin or end at any time
            path, _, flags = arguments
            if isinstance(path, str | bytes) and not _only_writes(flags):
                opened[os.fsdecode(path)] = None


def _only_writes(flags: object) -> bool:
    return isinstance(flags, int) and flags & os.O_ACCMODE == os.O_WRONLY


@functools.cache
def _hook() -> _Hook:
    """The only one: Python can't remove an audit hook, and each makes all calls that raise events slower."""
    return _Hook()


def _real(path: Path | str) -> Path:
    """The path without links; as it is if it can't be resolved."""
    try:
        return Path(path).resolve()
    except (OSError, ValueError, RuntimeError):
        return Path(path)


def _digest_of_file(path: Path) -> bytes:
    state = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while part := file.read(_CHUNK):
                state.update(part)
    except OSError:
        return b""
    return state.digest()
