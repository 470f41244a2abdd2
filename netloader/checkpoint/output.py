"""The files that a pull fills: tensors are views of mapped files, so that bytes go to the disk as they arrive.

The memory of a pull does not grow with the model: the pages of a mapped file belong to the page cache. The space is
reserved before the first byte arrives. A disk that fills up later can't end the process (SIGBUS).
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from netloader.checkpoint.file_errors import unwritable
from netloader.checkpoint.files import INDEX_SUFFIX
from netloader.checkpoint.layout import (
    SHARD_BYTES,
    Stored,
    check_storable,
    header_of,
    index_of,
    own_metadata,
    shard_names,
    shards_of,
)
from netloader.checkpoint.parts import Part, is_part, put_in_place, remove_left_parts
from netloader.checkpoint.writing import weight_files_in
from netloader.core.manifest import Manifest
from netloader.errors import CheckpointError, LocalProtocolError

if TYPE_CHECKING:
    import torch

__all__ = ["OutputFolder"]

_SYNC_BYTES = 64 << 20
"""Bytes that are written to the disk between two looks at whether to stop; a multiple of the page size."""


@dataclass(slots=True)
class _File:
    """One file that is being filled."""

    part: Part
    mapping: mmap.mmap


class OutputFolder:
    """A folder that a pull fills with safetensors files, as a context manager.

    The files have hidden names until :meth:`publish`. Leaving the context without it removes them, and the folders that
    were made. A process that is killed leaves them: entering the context removes those of processes that have ended.

    All methods may wait for the disk: call them in a worker thread.

    Args:
        path: The folder; made, with its parents, when it does not exist.
        overwrite: Whether weight files that are there may be replaced.
        shard_bytes: Most bytes in one file, unless a single tensor is larger.

    Attributes:
        removed: Names of the parts that a killed process had left.
        error: Why :meth:`allocate` failed; None when it did not.

    Raises (on entering):
        CheckpointError: Nothing can be written there.
    """

    def __init__(self, path: Path, *, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> None:
        self.path = path
        self.removed: list[str] = []
        self.error: CheckpointError | None = None
        self._overwrite = overwrite
        self._shard_bytes = shard_bytes
        self._made: list[Path] = []
        self._files: list[_File] = []
        self._index: Part | None = None
        self._strided: list[torch.Tensor] = []

    def __enter__(self) -> Self:
        try:
            self._make_folder()
            self.removed = remove_left_parts(self.path)
            Part(self.path / "model.safetensors").remove()
        except OSError as error:
            self._remove()
            raise unwritable(self.path, error) from error
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    @staticmethod
    def in_use(path: Path) -> bool:
        """Whether the folder holds anything but parts."""
        return any(not is_part(file.name) for file in path.iterdir())

    def _make_folder(self) -> None:
        missing = []
        folder = self.path
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.append(folder)
        if not self.path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    def _remove(self) -> None:
        self._remove_files()
        for folder in reversed(self._made):
            try:
                folder.rmdir()
            except OSError:  # something is in it, and it stays
                break
        self._made = []

    def _remove_files(self) -> None:
        for file in self._files:
            file.part.remove()
        if self._index is not None:
            self._index.remove()
        self._files, self._index, self._strided, self.error = [], None, [], None

    # --- before the pull ----------------------------------------------------------------------------------------------

    def allocate(self, manifest: Manifest, metadata: Mapping[str, str] | None) -> dict[str, torch.Tensor]:
        """Make the files for `manifest`, with space for every byte, in place of those of an earlier call.

        Args:
            manifest: The tensors.
            metadata: Written into every file; None (not known) for ``format: pt``.

        Returns:
            Name -> tensor, in the order of the manifest: views of the files. An alias is the tensor of its owner.

        Raises:
            CheckpointError: The file system has too little space, or safetensors files can't hold the tensors.
        """
        self._remove_files()
        try:
            return self._allocate(manifest, {"format": "pt"} if metadata is None else metadata)
        except CheckpointError as error:
            self.error = error
            raise

    def _allocate(self, manifest: Manifest, metadata: Mapping[str, str]) -> dict[str, torch.Tensor]:
        check_storable((spec.name, spec.dtype, spec.shape) for spec in manifest.tensors)
        entries = [Stored(s.name, s.dtype, s.shape, s.nbytes) for s in manifest.tensors if not s.alias_of]
        aliases = {spec.name: spec.alias_of for spec in manifest.tensors if spec.alias_of}
        shards = shards_of(entries, self._shard_bytes)
        names = shard_names(len(shards))
        headers = [
            header_of(name, shard, own_metadata(metadata, aliases, shard))
            for name, shard in zip(names, shards, strict=True)
        ]
        self._check_space(sum(map(len, headers)) + manifest.nbytes)
        strides = {spec.name: spec.stride for spec in manifest.tensors if spec.stride}
        made: dict[str, torch.Tensor] = {}
        for name, shard, header in zip(names, shards, headers, strict=True):
            size = len(header) + sum(entry.nbytes for entry in shard)
            made |= dict(self._views(self._file(self.path / name, header, size), len(header), shard, strides))
        if len(shards) > 1:
            self._index = Part(self.path / f"model{INDEX_SUFFIX}")
            _write(self._index, index_of(names, shards))
        return {spec.name: made[spec.alias_of or spec.name] for spec in manifest.tensors}

    def _check_space(self, needed: int) -> None:
        try:
            found = os.statvfs(self.path)
        except OSError as error:
            raise unwritable(self.path, error) from error
        free = found.f_bavail * found.f_frsize
        if free < needed:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise CheckpointError(
                f"{self.path} needs {needed} bytes, and its file system has {free} free",
                hint="free space, or choose another folder",
            ) from full

    def _file(self, place: Path, header: bytes, size: int) -> mmap.mmap:
        part = Part(place)
        try:
            os.posix_fallocate(part.descriptor, 0, size)
            os.pwrite(part.descriptor, header, 0)
            mapping = mmap.mmap(part.descriptor, size)
        except BaseException as error:
            part.remove()
            if isinstance(error, OSError):
                raise unwritable(place, error) from error
            raise
        self._files.append(_File(part, mapping))
        return mapping

    def _views(
        self, mapping: mmap.mmap, start: int, shard: list[Stored], strides: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        import torch

        whole = torch.frombuffer(mapping, dtype=torch.uint8)
        for entry in shard:
            dtype = getattr(torch, entry.dtype)
            if not entry.nbytes:
                yield entry.name, torch.empty(entry.shape, dtype=dtype)
                continue
            tensor = whole[start : start + entry.nbytes].view(dtype).reshape(entry.shape)
            start += entry.nbytes
            if entry.name in strides:  # bytes arrive in the order of the memory; `sync` puts them into the file's order
                tensor = tensor.as_strided(entry.shape, strides[entry.name])
                self._strided.append(tensor)
            yield entry.name, tensor

    # --- after the pull -----------------------------------------------------------------------------------------------

    def sync(self, progress: Callable[[int, int], None]) -> None:
        """Write what is only in memory to the disk.

        Args:
            progress: Called with the bytes that are on the disk so far, and the total. An exception that it raises
                stops the writing.

        Raises:
            CheckpointError: The disk reports an error.
        """
        for tensor in self._strided:
            row_major = tensor.contiguous()
            tensor.as_strided(row_major.shape, row_major.stride()).copy_(row_major)
        self._strided = []
        total = sum(len(file.mapping) for file in self._files)
        done = 0
        for file in self._files:
            try:
                for at in range(0, len(file.mapping), _SYNC_BYTES):
                    progress(done, total)
                    part = min(_SYNC_BYTES, len(file.mapping) - at)
                    file.mapping.flush(at, part)
                    done += part
                os.fsync(file.part.descriptor)
            except OSError as error:
                raise unwritable(file.part.place, error) from error
        progress(done, total)

    def publish(self) -> list[Path]:
        """Give the files their final names, in place of older weight files if allowed. Call :meth:`sync` before.

        Returns:
            The files, in order; the index comes last.

        Raises:
            CheckpointError: A file can't be renamed, or another process has written weight files meanwhile.
        """
        if not self._files:
            raise LocalProtocolError("there are no files to publish: nothing was allocated")
        parts = [file.part for file in self._files]
        if self._index is not None:
            parts.append(self._index)
        try:
            present = weight_files_in(self.path)
        except OSError as error:
            raise unwritable(self.path, error) from error
        if present and not self._overwrite:
            raise CheckpointError(f"{present[0]} was written meanwhile", hint="choose another folder, or overwrite")
        return put_in_place(parts, present)


def _write(part: Part, data: bytes) -> None:
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(part.descriptor, left) :]
        os.fsync(part.descriptor)
    except OSError as error:
        raise unwritable(part.place, error) from error
