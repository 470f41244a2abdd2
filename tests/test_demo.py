"""The demonstration as a user starts it: two processes over gloo, with and without faults; and its own comparison."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import xxhash

from netloader.checkpoint import make_demo_checkpoint
from netloader.cli.demo_run import compare_checkpoints
from netloader.core.plan import block_bytes_for
from tests.commands import no_traceback, run

Stored = tuple[str, list[int], bytes]


def test_the_demo_verifies_what_it_pulled(tmp_path: Path) -> None:
    done = run("demo", "--bytes", "16MB", "--keep", tmp_path / "kept", fresh=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "verified: all tensors bit-exact"
    assert lines[-2].startswith("compared ")
    client = [line.removeprefix("client | ") for line in lines if line.startswith("client | ")]
    server = [line.removeprefix("server | ") for line in lines if line.startswith("server | ")]
    whole = "16.0 MB of 16.0 MB (100%)"
    assert any(line.startswith(f"netloader: written {whole}") for line in client), "no progress of the client"
    assert any(line.startswith(f"netloader: hashed {whole}") for line in server), "no progress of the server"
    assert sum(line.startswith("pulled ") for line in client) == 1
    assert any("TRANSFER over gloo" in line for line in server)
    assert any(line.startswith("phases: connect ") for line in client), "no report"
    assert server[-1] == "stopped"
    found = compare_checkpoints(tmp_path / "kept" / "original", tmp_path / "kept" / "pulled")
    assert (found.tensors, found.problems) == (39, ())
    assert abs(found.nbytes - 16_000_000) < 100_000


# --- faults on the wire -----------------------------------------------------------------------------------------------

HARMED_BYTES = 10_000_000


@dataclass(frozen=True)
class Piece:
    """A block as the documentation of the protocol defines it, made without the package's own code."""

    tensors: tuple[str, ...]
    data: bytes

    def digest(self, flipped: int | None = None) -> str:
        """Its digest; with the lowest bit of byte `flipped` flipped."""
        data = bytearray(self.data)
        if flipped is not None:
            data[flipped] ^= 1
        return xxhash.xxh3_128(data).hexdigest()


def pieces(folder: Path) -> list[Piece]:
    """All blocks of a checkpoint: tensors by name, large ones cut, small ones packed."""
    stored: dict[str, bytes] = {}
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        (length,) = struct.unpack_from("<Q", raw)
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                stored[name] = raw[begin:end]
    size = block_bytes_for(sum(map(len, stored.values())))
    found: list[Piece] = []
    pack = Piece((), b"")
    for name in sorted(stored):
        data = stored[name]
        if len(data) >= size:
            found += [Piece((name,), data[at : at + size]) for at in range(0, len(data), size)]
            continue
        if len(pack.data) + len(data) > size:
            found.append(pack)
            pack = Piece((), b"")
        pack = Piece((*pack.tensors, name), pack.data + data)
    return [*found, pack] if pack.tensors else found


@pytest.fixture(scope="module")
def expected_blocks(tmp_path_factory: pytest.TempPathFactory) -> list[Piece]:
    """The blocks of what the demo serves: equal sizes give equal bytes."""
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    make_demo_checkpoint(folder, HARMED_BYTES)
    return pieces(folder)


@pytest.mark.timeout(400)  # thirty processes
def test_the_demo_detects_flipped_bytes_at_random_places(expected_blocks: list[Piece]) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    places = [
        (block, chance.randrange(len(expected_blocks[block].data)))
        for block in chance.choices(range(len(expected_blocks)), k=10)
    ]

    def demo(place: tuple[int, int]) -> subprocess.CompletedProcess[str]:
        return run("demo", "--bytes", str(HARMED_BYTES), "--fault", "corrupt:{}:{}".format(*place))

    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(demo, places))
    assert len(expected_blocks) >= 3
    for (block, byte), done in zip(places, ended, strict=True):
        where = f"seed {seed}, block {block}, byte {byte}: {done.stdout}"
        assert done.returncode == 3, where
        lines = [line.removeprefix("client | ") for line in done.stdout.splitlines()]
        said = [line for line in lines if line.startswith(f"corrupt: block {block} from 127.0.0.1:")]
        words = [tuple(line.split()) for line in lines if line.startswith("  ")]
        assert words == len(said) * [
            *(("tensor", name) for name in expected_blocks[block].tensors),
            ("announced", expected_blocks[block].digest()),
            ("arrived", expected_blocks[block].digest(byte)),
        ], where
        assert said, where
        assert "bit-exact" not in done.stdout, where
        assert no_traceback(done.stdout + done.stderr), where


@pytest.mark.parametrize(("fault", "reason"), [("cut:1", "ended"), ("stall:1", "for 3 s")])
def test_the_demo_reports_a_broken_connection(fault: str, reason: str) -> None:
    done = run("demo", "--bytes", "8MB", "--fault", fault)
    assert done.returncode == 1, done.stdout
    told = done.stdout.partition("client | netloader: error: no source could be pulled from")[2]
    assert reason in told, done.stdout
    assert "bit-exact" not in done.stdout
    assert no_traceback(done.stdout + done.stderr)


def test_the_demo_refuses_a_fault_that_cannot_happen() -> None:
    done = run("demo", "--bytes", "2MB", "--fault", "corrupt:4096")
    assert done.returncode == 2
    assert "server | netloader: error: --fault block = 4096 is not valid" in done.stdout


# --- the comparison ---------------------------------------------------------------------------------------------------


def write(folder: Path, tensors: Mapping[str, Stored], name: str = "model.safetensors") -> Path:
    """A safetensors file, written without the package's code: the test must not depend on the code that it checks."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for key, (dtype, shape, contents) in tensors.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(contents)]}
        data += contents
    encoded = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return folder


A: Stored = ("U8", [4], b"abcd")
B: Stored = ("F16", [2, 1], b"efgh")
NOTHING: Stored = ("F32", [0], b"")


def test_equal_checkpoints_are_equal_whatever_their_files(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"a": A, "b": B, "nothing": NOTHING})
    other = write(tmp_path / "other", {"nothing": NOTHING, "b": B}, "model-00001-of-00002.safetensors")
    write(other, {"a": A}, "model-00002-of-00002.safetensors")
    found = compare_checkpoints(one, other)
    assert (found.tensors, found.nbytes, found.problems) == (3, 8, ())


@pytest.mark.parametrize(
    ("copy", "problem"),
    [
        ({"a": A}, "b is missing"),
        ({}, "a is missing"),
        ({"a": A, "b": B, "c": A}, "c is in the copy only"),
        ({"a": ("U8", [4], b"abce"), "b": B}, "a has other contents"),
        ({"a": ("I8", [4], b"abcd"), "b": B}, "a is U8"),
        ({"a": ("U8", [2, 2], b"abcd"), "b": B}, "a is U8"),
        ({"a": B, "b": A}, "a is U8"),
    ],
)
def test_every_kind_of_difference_is_reported(copy: dict[str, Stored], problem: str, tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"a": A, "b": B})
    found = compare_checkpoints(one, write(tmp_path / "copy", copy))
    assert any(text.startswith(problem) for text in found.problems)


def test_a_difference_in_the_last_byte_of_a_large_tensor_is_found(tmp_path: Path) -> None:
    large = bytes((3 << 20) + 1)
    one = write(tmp_path / "one", {"a": ("U8", [len(large)], large)})
    copy = write(tmp_path / "copy", {"a": ("U8", [len(large)], large[:-1] + b"\x01")})
    assert compare_checkpoints(one, copy).problems == ("a has other contents",)
    assert compare_checkpoints(one, one).problems == ()


def test_a_truncated_file_is_not_a_copy(tmp_path: Path) -> None:
    one = write(tmp_path / "one", {"a": A})
    copy = write(tmp_path / "copy", {"a": A})
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert compare_checkpoints(one, copy).problems == ("a has other contents",)
