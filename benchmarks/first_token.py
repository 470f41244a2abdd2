"""Seconds from the start of a new vLLM replica to its first token, by phase: pulled, and read from storage.

Usage: ``python -m benchmarks.first_token [--rounds 3] [--layers 12] [--hidden 2048] [--folder DIR]``

Needs vLLM in the environment. Cases, interleaved: ``netloader`` (a folder without weight files; pulled from an engine
that serves), ``default_warm`` (vLLM's default loader, files in the page cache), ``default_cold`` (the same, after the
files were dropped from the page cache; the line has the share that was still cached). Prints a JSON line for each start
and one with medians for each case. ``load`` is the time that the loader itself reports; ``start`` is everything else
until the HTTP API answers, mostly imports; ``first_token`` is one request for one token after that.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.e2e import clients, engines
from tests.e2e.engines import Engine
from tests.models import make_llama, strip_weights

CASES = ("netloader", "default_warm", "default_cold")

_PULLED = re.compile(r"pulled [^;]*\(target, \d+ tensors\) in ([\d.]+) s \(")
_READ = re.compile(r"Loading weights took ([\d.]+) seconds")


def weight_files(folder: Path) -> list[Path]:
    """The files that the default loader reads."""
    return sorted(folder.glob("*.safetensors"))


def put_out_of_cache(files: list[Path]) -> None:
    """Ask the system to drop these files from the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bring_into_cache(files: list[Path]) -> None:
    """Read all of these files."""
    for path in files:
        with path.open("rb") as file:
            while file.read(64 << 20):
                pass


def share_in_cache(files: list[Path]) -> float:
    """Which share of these files is in the page cache."""
    import ctypes

    libc: Any = ctypes.CDLL(None)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    there = pages = 0
    for path in files:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as view:
            count = -(-len(view) // mmap.PAGESIZE)
            found = ctypes.create_string_buffer(count)
            first = ctypes.c_char.from_buffer(view)
            libc.mincore(ctypes.addressof(first), len(view), found)
            del first  # the mapping cannot be closed while its address is in use
            there += sum(page & 1 for page in found.raw)
            pages += count
    return there / pages if pages else 0.0


def measure(case: str, model: Path, log: Path, config: dict[str, Any] | None) -> dict[str, Any]:
    """One start."""
    load_format = "netloader" if config is not None else "auto"
    began = time.monotonic()
    with engines.engine(model, log, load_format=load_format, config=config) as engine:
        engine.wait_ready()
        ready = time.monotonic()
        engine.complete("one two three four", 1)
        done = time.monotonic()
        load = _seconds(engine, _PULLED if config is not None else _READ)
    return {
        "case": case,
        "seconds": round(done - began, 2),
        "load": load,
        "start": round(ready - began - load, 2),
        "first_token": round(done - ready, 3),
    }


def _seconds(engine: Engine, pattern: re.Pattern[str]) -> float:
    found = pattern.search(engine.text())
    if found is None:
        raise engine.fail(f"no line of the log says {pattern.pattern!r}")
    return float(found[1])


def main() -> None:
    """Measure, and print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--folder", type=Path, help="where to keep the model and logs; a temporary one by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        full = folder / "full"
        if not full.exists():
            make_llama(full, layers=args.layers, hidden=args.hidden)
        bare = folder / "bare" if (folder / "bare").exists() else strip_weights(full, folder / "bare")
        files = weight_files(full)
        nbytes = sum(path.stat().st_size for path in files)
        results: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
        name = {"MODEL": "benchmark"}
        with engines.engine(full, folder / "seed.log", config=name) as seed:
            address = seed.wait_ready().wait_addresses()[0]
            for number in range(args.rounds):
                for case in CASES:
                    cached = None
                    if case == "default_warm":
                        bring_into_cache(files)
                    if case == "default_cold":
                        put_out_of_cache(files)
                        cached = share_in_cache(files)
                    config = {**name, **clients.source(address), "FALLBACK": False} if case == "netloader" else None
                    line = measure(case, bare if config else full, folder / f"{case}-{number}.log", config)
                    if cached is not None:
                        line["share_in_cache"] = round(cached, 3)
                    results[case].append(line)
                    print(json.dumps({"round": number, "bytes": nbytes, **line}), flush=True)
        for case, lines in results.items():
            medians = {
                key: round(statistics.median(line[key] for line in lines), 3)
                for key in ("seconds", "load", "start", "first_token")
            }
            print(json.dumps({"summary": case, "bytes": nbytes, **medians}), flush=True)


if __name__ == "__main__":
    main()
