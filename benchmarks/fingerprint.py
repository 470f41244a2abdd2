"""How long the fingerprint of a checkpoint takes: `python benchmarks/fingerprint.py FOLDER`.

Prints the time with the files in the page cache, and with their pages dropped from it (if the system follows that
advice): the median of five runs each. Without a folder it makes a checkpoint of 2 GB in 4 files and 291 tensors, as
many as Llama 3 8B has.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from netloader.checkpoint import fingerprint_of
from netloader.checkpoint.fingerprint import weight_files_of

TENSORS, FILES, TENSOR_BYTES = 291, 4, 7 << 20
TRIES = 5


def make(folder: Path) -> None:
    """A checkpoint with random contents."""
    names = [f"model.layers.{number}.weight" for number in range(TENSORS)]
    for file in range(FILES):
        mine = names[file::FILES]
        header = {
            name: {"dtype": "U8", "shape": [TENSOR_BYTES], "data_offsets": [at * TENSOR_BYTES, (at + 1) * TENSOR_BYTES]}
            for at, name in enumerate(mine)
        }
        encoded = json.dumps(header).encode()
        with (folder / f"model-{file + 1:05d}-of-{FILES:05d}.safetensors").open("wb") as out:
            out.write(len(encoded).to_bytes(8, "little") + encoded)
            for _ in mine:
                out.write(os.urandom(TENSOR_BYTES))
            out.flush()
            os.fsync(out.fileno())


def drop(folder: Path) -> None:
    """Ask the system to drop the files' pages from the page cache."""
    for file in weight_files_of(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(folder: Path, *, cold: bool) -> float:
    """Median time in milliseconds."""
    taken = []
    for _ in range(TRIES):
        if cold:
            drop(folder)
        began = time.perf_counter()
        fingerprint_of(folder)
        taken.append((time.perf_counter() - began) * 1e3)
    return statistics.median(taken)


def main(folder: Path) -> None:
    """Measure and print."""
    fingerprint_of(folder)
    warm, cold = measure(folder, cold=False), measure(folder, cold=True)
    files = weight_files_of(folder)
    size = sum(file.stat().st_size for file in files)
    print(f"{len(files)} files, {size / 1e9:.1f} GB: {warm:.1f} ms from the page cache, {cold:.1f} ms from storage")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            make(Path(made))
            main(Path(made))
