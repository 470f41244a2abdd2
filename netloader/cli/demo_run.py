"""The demonstration: a server process and a client process move a checkpoint, then both copies are compared.

The comparison reads the files byte by byte with the standard library only, so that it does not rely on the code that
moved the bytes.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import anyio
import anyio.to_thread
from anyio.abc import Process

from netloader.errors import ConfigError, NetloaderError, TransferTimeout
from netloader.observe.progress import byte_text

__all__ = ["Comparison", "compare_checkpoints", "run_demo"]

_START = 60.0
_RUN = 120.0
_STOP = 5.0
_STALL = "3"
"""Seconds. Short, so that an injected stall ends soon."""

_EVERY = "0.1"
_PART = 1 << 20
_ADDRESS = re.compile(r"serving .* at (\S+:[0-9]+)")
_UNVERIFIED = 3

Say = Callable[[str], object]


async def run_demo(nbytes: int, transports: Sequence[str], fault: str | None, keep: Path | None, say: Say) -> int:
    """Make a checkpoint, serve it in one process, pull it in another, compare both.

    Args:
        nbytes: Approximate size of the checkpoint, in bytes.
        transports: Names of the transports that may be used.
        fault: The fault to inject, as on the command line; None for none.
        keep: New or empty folder for both checkpoints; None for a temporary one.
        say: Called with each line of output.

    Returns:
        The client's exit status; 3 as well when it reports success and the files differ.

    Raises:
        ConfigError: `keep` is not empty.
        NetloaderError: The server did not start.
    """
    with _workplace(keep) as folder:
        original, pulled = folder / "original", folder / "pulled"
        files = await anyio.to_thread.run_sync(_make, original, nbytes)
        say(f"made a checkpoint of {byte_text(nbytes)} in {len(files)} files")
        status = await _serve_and_pull(original, pulled, transports, fault, say)
        if status != 0:
            say(f"the client ended with status {status}")
            return status
        found = await anyio.to_thread.run_sync(compare_checkpoints, original, pulled)
        for problem in found.problems:
            say(f"differs: {problem}")
        if found.problems:
            return _UNVERIFIED
        say(f"compared {found.tensors} tensors, {byte_text(found.nbytes)}, file against file")
        say("verified: all tensors bit-exact")
        return 0


def _make(folder: Path, nbytes: int) -> list[Path]:
    from netloader import checkpoint

    return checkpoint.make_demo_checkpoint(folder, nbytes)


@contextmanager
def _workplace(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="netloader-demo-") as made:
            yield Path(made)
        return
    if keep.is_file() or (keep.is_dir() and any(keep.iterdir())):
        raise ConfigError(field="--keep", value=str(keep), allowed="a new or empty folder")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep


# --- the two processes ------------------------------------------------------------------------------------------------


async def _serve_and_pull(original: Path, pulled: Path, transports: Sequence[str], fault: str | None, say: Say) -> int:
    common = ["--transport", ",".join(transports), "--stall-timeout", _STALL, "--progress-every", _EVERY]
    serve = ["serve", str(original), "--host", "127.0.0.1", "--stop-on-eof", *common]
    if fault is not None:
        serve += ["--fault", fault]
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(_DemoProcess.started("server", serve, say))
        address = await server.address()
        if address is None:
            return await server.status(_STOP)
        client = await stack.enter_async_context(
            _DemoProcess.started("client", ["pull", address, "-o", str(pulled), *common], say)
        )
        status = await client.status(_RUN)
        await server.stop()
        return status


class _DemoProcess:
    """One of the two processes. Its output is printed with its name in front."""

    def __init__(self, name: str, process: Process, say: Say) -> None:
        self._name = name
        self._process = process
        self._say = say
        self._address: str | None = None
        self._known = anyio.Event()
        self._silent = anyio.Event()

    @classmethod
    @asynccontextmanager
    async def started(cls, name: str, arguments: Sequence[str], say: Say) -> AsyncIterator[_DemoProcess]:
        """Start the process. When the block ends, the process has ended."""
        command = [sys.executable, "-m", "netloader", *arguments]
        # Its standard input is a pipe that ends with this process, so that a server never outlives the demo.
        process = await anyio.open_process(command, stdin=subprocess.PIPE, stderr=subprocess.STDOUT)
        side = cls(name, process, say)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(side._relay)
            try:
                yield side
            finally:
                with anyio.move_on_after(2 * _STOP, shield=True):
                    await side.stop()
                    await process.aclose()
                tasks.cancel_scope.cancel()

    async def address(self) -> str | None:
        """The address of the server; None when it ended instead.

        Raises:
            TransferTimeout: It printed no address in time.
        """
        with anyio.move_on_after(_START):
            await self._known.wait()
            return self._address
        raise TransferTimeout(f"the {self._name} was not ready within {_START:g} s")

    async def status(self, within: float) -> int:
        """Wait for the exit status.

        Raises:
            TransferTimeout: The process still runs.
        """
        with anyio.move_on_after(within):
            await self._silent.wait()
            return await self._process.wait()
        raise TransferTimeout(f"the {self._name} did not end within {within:g} s")

    async def stop(self) -> None:
        """End the process: terminate it, and kill it if that is not enough."""
        if self._process.returncode is not None:
            return
        self._process.terminate()
        with anyio.move_on_after(_STOP):
            await self.status(_STOP)
            return
        self._process.kill()
        await self._process.wait()

    async def _relay(self) -> None:
        output = self._process.stdout
        if output is None:
            raise NetloaderError(f"the {self._name} has no output")
        rest = b""
        async for part in output:
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                self._hear(line.decode(errors="replace"))
        if rest:
            self._hear(rest.decode(errors="replace"))
        self._known.set()
        self._silent.set()

    def _hear(self, line: str) -> None:
        self._say(f"{self._name} | {line}")
        found = _ADDRESS.fullmatch(line)
        if found is not None and self._address is None:
            self._address = found.group(1)
            self._known.set()


# --- the comparison ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        tensors: Number of tensors in the original.
        nbytes: Their bytes.
        problems: One line for each tensor that differs, is missing or is additional.
    """

    tensors: int
    nbytes: int
    problems: tuple[str, ...]


@dataclass(frozen=True)
class _Stored:
    """The position of a tensor in a file."""

    path: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    def parts(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            left = self.nbytes
            while left > 0:
                part = file.read(min(left, _PART))
                if not part:
                    return
                left -= len(part)
                yield part


def compare_checkpoints(original: Path, copy: Path) -> Comparison:
    """Compare the tensors in all safetensors files of two folders, byte by byte.

    Raises:
        ValueError: A file is not a valid safetensors file, or a tensor is stored twice.
    """
    first, second = _stored(original), _stored(copy)
    problems = [f"{name} is missing" for name in first if name not in second]
    problems += [f"{name} is in the copy only" for name in second if name not in first]
    for name, one in first.items():
        other = second.get(name)
        if other is None:
            continue
        if (one.dtype, one.shape, one.nbytes) != (other.dtype, other.shape, other.nbytes):
            problems.append(f"{name} is {one.dtype} {one.shape} in one and {other.dtype} {other.shape} in the other")
        elif any(a != b for a, b in zip_longest(one.parts(), other.parts())):
            problems.append(f"{name} has other contents")
    return Comparison(len(first), sum(one.nbytes for one in first.values()), tuple(problems))


def _stored(folder: Path) -> dict[str, _Stored]:
    found: dict[str, _Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if name in found:
                raise ValueError(f"{name} is in {found[name].path.name} and in {path.name}")
            begin, end = entry["data_offsets"]
            found[name] = _Stored(path, 8 + length + begin, end - begin, entry["dtype"], tuple(entry["shape"]))
    return found
