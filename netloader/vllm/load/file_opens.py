"""Which files a model opens while it is built, beside those that safetensors and `torch.load` read.

A constructor may read weights in any way: `numpy.load`, `numpy.fromfile`, `pickle`, `open` and its own parser. What
such code makes of the bytes can't be followed. So every file that it opened must be one that holds no weights, one of
the checkpoint's own weight files, or one whose contents were seen as tensors. An audit hook of Python sees every file
that Python code opens, whatever function opens it. A library in C that opens files itself is not seen.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import xxhash

from netloader.checkpoint.fingerprint import weight_files_of

__all__ = ["FileOpens", "content_digest"]

_NO_WEIGHTS = frozenset(
    {
        *(".json", ".jsonl", ".txt", ".md", ".yaml", ".yml", ".toml", ".cfg", ".jinja", ".py", ".pyc", ".lock"),
        *(".model", ".tiktoken", ".vocab", ".bpe", ".so"),
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
    """Records the files that this process opens, from `start` until `stop`.

    Python cannot remove an audit hook. After `stop` the hook holds nothing and only compares two values.

    Args:
        folder: The folder of the model; None if it is not on this host.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._opened: dict[str, None] = {}  # an ordered set
        self._stop: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Begin to record."""
        self._stop = _observe_opens(self._opened)

    def stop(self) -> None:
        """End the recording."""
        self._stop()

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


def _observe_opens(opened: dict[str, None]) -> Callable[[], None]:
    """Add the path of each file that is opened to `opened`. Returns a function that ends that."""
    into: list[dict[str, None]] = [opened]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event != "open":
            return
        for paths in into:  # a loop, because another thread may end the recording at any time
            path = arguments[0]
            if isinstance(path, str | bytes):
                paths[os.fsdecode(path)] = None

    sys.addaudithook(hook)
    return into.clear


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
