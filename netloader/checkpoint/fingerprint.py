"""The fingerprint of a checkpoint: a digest that distinguishes checkpoints without reading them completely.

Two fine-tunes of one model have files of equal names, sizes and headers; only their contents differ. Reading all of it
takes as long as loading. So the fingerprint covers what the headers of safetensors files say about each tensor, and
samples of the contents. Number and positions of the samples depend only on sizes. Therefore equal weights have equal
fingerprints on every host, even when they are split into files differently. For weight files of other formats it covers
the size and samples of each file.

Checkpoints that differ only between the samples have equal fingerprints. The root, which covers every byte,
distinguishes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from netloader.checkpoint.files import WEIGHT_SUFFIX, choose_files
from netloader.errors import CheckpointError

__all__ = ["SAMPLES", "fingerprint_of", "weight_files_of"]

SAMPLES = 1024
"""Samples of a whole checkpoint, spread over its tensors. Reading them takes a few milliseconds from memory and, at a
tenth of a millisecond each, about 100 ms from a solid-state disk."""

LEAST_PER_FILE = 2
"""Least samples of each file that is not a safetensors file."""

SAMPLE_BYTES = 1024

_OTHERS = (".bin", ".pt", ".pth", ".gguf")
_NO_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"})
"""Files that trainers write beside weights, and that engines don't load."""

_MAX_HEADER = 100 << 20
"""The format's own limit."""

_LARGEST = 1 << 60


class _Entry(msgspec.Struct):
    dtype: str = ""
    shape: tuple[int, ...] = ()
    data_offsets: tuple[int, int] | None = None


class _Piece(NamedTuple):
    """A tensor, or a file whose tensors are not known.

    Attributes:
        label: What is known about it besides its contents. Pieces are ordered by label.
        file: Index of its file.
        begin: Its first byte in the file.
        size: Its size in bytes.
    """

    label: bytes
    file: int
    begin: int
    size: int


def fingerprint_of(path: Path | str) -> str:
    """Fingerprint of the checkpoint in a folder, or of a single weight file, in hex.

    Args:
        path: The folder, or the file.

    Returns:
        The digest; empty (not known) when there are no weight files, when files that an index names are missing, or
        when they can't be read. None of these is an error here.
    """
    try:
        files = weight_files_of(Path(path))
        if not files:
            return ""
        with contextlib.ExitStack() as stack:
            return _digest([_opened(file, stack) for file in files], [file.name for file in files])
    except OSError:
        return ""


def weight_files_of(path: Path) -> tuple[Path, ...]:
    """The files that hold the weights, in the order of their names; empty when one of them is missing.

    Safetensors files are preferred to all others, as in engines; which of them, :mod:`netloader.checkpoint.files` says.
    """
    if path.is_file():
        return (path,)
    if not path.is_dir():
        return ()
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".") and entry.is_file())
    try:
        chosen = choose_files(path).names
    except CheckpointError:  # no index that decides: all that may be meant
        chosen = tuple(name for name in names if name.endswith(WEIGHT_SUFFIX))
    present = [name for name in chosen if (path / name).is_file()]
    if not present:  # also a client's folder that holds only the index
        present = [name for name in names if name.endswith(_OTHERS) and name not in _NO_WEIGHTS]
    elif len(present) < len(chosen):
        return ()
    return tuple(path / name for name in present)


def _opened(file: Path, stack: contextlib.ExitStack) -> int:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    return descriptor


def _digest(descriptors: Sequence[int], names: Sequence[str]) -> str:
    tensors: list[_Piece] = []
    others: list[_Piece] = []
    for number, descriptor in enumerate(descriptors):
        size = os.fstat(descriptor).st_size
        header = _header(descriptor, size) if names[number].endswith(WEIGHT_SUFFIX) else b""
        found = _tensors(header, number)
        tensors += found
        if not found:
            others.append(_Piece(size.to_bytes(8, "little"), number, 0, size))
    tensors.sort()
    digest = hashlib.blake2b(msgspec.msgpack.encode([piece.label for piece in (*tensors, *others)]), digest_size=16)
    places = [*_places(tensors, SAMPLES), *_places(others, max(SAMPLES, LEAST_PER_FILE * len(others)))]
    _announce(descriptors, places)
    for file, at, length in places:
        digest.update(os.pread(descriptors[file], length, at))
    return digest.hexdigest()


def _header(descriptor: int, size: int) -> bytes:
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    return os.pread(descriptor, length, 8) if length <= min(size - 8, _MAX_HEADER) else b""


def _tensors(header: bytes, file: int) -> list[_Piece]:
    """The tensors that a header names; empty when it is not a valid header."""
    try:
        entries = msgspec.json.decode(header, type=dict[str, _Entry]) if header else {}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return []
    start = 8 + len(header)
    found = []
    for name, entry in entries.items():
        begin, end = entry.data_offsets or (0, -1)  # the entry of the file's metadata has none
        if 0 <= begin <= end <= _LARGEST:
            label = msgspec.msgpack.encode((name, entry.dtype, entry.shape))
            found.append(_Piece(label, file, start + begin, end - begin))
    return found


def _places(pieces: Sequence[_Piece], most: int) -> list[tuple[int, int, int]]:
    """File, first byte and length of each sample. Samples are spread evenly over each piece, or over many pieces.

    For pieces in a fixed order they depend only on sizes.
    """
    filled = [piece for piece in pieces if piece.size]
    if len(filled) > most:
        # One sample for each of `most` evenly chosen pieces; the last piece is one of them.
        filled = [filled[(number + 1) * len(filled) // most - 1] for number in range(most)]
    places = []
    for piece in filled:
        length = min(SAMPLE_BYTES, piece.size)
        each = min(most // len(filled), -(-piece.size // SAMPLE_BYTES))
        for number in range(each):
            # The first sample is at the start of the piece, the last at its end, and a single one in the middle.
            room = piece.size - length
            at = room * number // (each - 1) if each > 1 else room // 2
            places.append((piece.file, piece.begin + at, length))
    return places


def _announce(descriptors: Sequence[int], places: Sequence[tuple[int, int, int]]) -> None:
    """Let the system prefetch all samples in parallel, without readahead, instead of hundreds of slow reads."""
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError):  # only advice, which a file system may refuse
        for descriptor in descriptors:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for file, at, length in places:
            os.posix_fadvise(descriptors[file], at, length, os.POSIX_FADV_WILLNEED)
