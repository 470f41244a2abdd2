"""Limits of the machine: the same tensors moved without protocol, checks or names.

Reference cases: a TCP loop over 1 or 2 streams (reno, scatter-gather), the same with a small send buffer
(``raw_tcp_bounded``, as netloader's `tcp` within a host), reading the server's memory with 1 or 2 threads
(process_vm_readv), and copying within this process with 1 or 2 threads. Both sides know all sizes beforehand.

A server process prints one JSON line when it is ready, and serves until its standard input closes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.workloads import make

__all__ = ["RAW_CASES", "RawCases", "addresses_of", "groups_of", "memcpy", "read_memory", "serve", "tcp_pull"]

GROUP_BYTES = 4 << 20
GROUP_SPANS = 1024
BOUNDED_BYTES = 512 << 10

_LIBC = ctypes.CDLL(None, use_errno=True)


def groups_of(tensors: Mapping[str, torch.Tensor]) -> list[list[memoryview]]:
    """All bytes in order, in groups of at most 4 MiB and 1024 pieces; both sides make the same groups."""
    groups: list[list[memoryview]] = [[]]
    size = 0
    for tensor in tensors.values():
        flat = tensor.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(flat), GROUP_BYTES):
            piece = flat[start : start + GROUP_BYTES]
            if groups[-1] and (size + len(piece) > GROUP_BYTES or len(groups[-1]) == GROUP_SPANS):
                groups.append([])
                size = 0
            groups[-1].append(piece)
            size += len(piece)
    return groups


def _tune(stream: socket.socket) -> None:
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def _whole(move: Callable[[Sequence[memoryview]], int], group: list[memoryview]) -> None:
    """Call `move` until it has moved all of `group`."""
    rest = group
    while rest:
        moved = move(rest)
        if moved == 0:
            raise ConnectionError("the other side closed")
        place = 0
        while place < len(rest) and moved >= len(rest[place]):
            moved -= len(rest[place])
            place += 1
        rest = rest[place:]
        if moved:
            rest = [rest[0][moved:], *rest[1:]]


def _in_threads(work: Callable[[int], None], count: int) -> None:
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(1, count)]
    for thread in threads:
        thread.start()
    run(0)
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def tcp_pull(port: int, groups: list[list[memoryview]], streams: int, *, bounded: bool = False) -> None:
    """Receive all groups over `streams` connections in rotation; `bounded`: the sender has a small send buffer."""

    def receive(index: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as stream:
            _tune(stream)
            stream.sendall(bytes([index, streams, bounded]))
            for group in groups[index::streams]:
                _whole(lambda rest: stream.recvmsg_into(rest, 0, socket.MSG_WAITALL)[0], group)

    _in_threads(receive, streams)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _iovecs(spans: Sequence[tuple[int, int]]) -> ctypes.Array[_Iovec]:
    return (_Iovec * len(spans))(*spans)


def addresses_of(groups: list[list[memoryview]]) -> list[list[tuple[int, int]]]:
    """Address and size in bytes of each piece."""
    return [[(ctypes.addressof(ctypes.c_char.from_buffer(piece)), len(piece)) for piece in group] for group in groups]


def read_memory(pid: int, remote: list[Any], local: list[Any], threads: int) -> None:
    """Read all groups from another process's memory; `remote` and `local` are arrays of iovecs."""

    def read(index: int) -> None:
        for there, here in zip(remote[index::threads], local[index::threads], strict=True):
            count = _LIBC.process_vm_readv(pid, here, len(here), there, len(there), 0)
            if count != sum(one.length for one in here):
                raise OSError(ctypes.get_errno(), f"process_vm_readv gave {count} bytes")

    _LIBC.process_vm_readv.restype = ctypes.c_ssize_t
    _in_threads(read, threads)


def memcpy(source: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor], threads: int) -> None:
    """Copy all tensors within this process."""
    pairs = list(zip(into.values(), source.values(), strict=True))
    if len(pairs) < threads:
        pairs = [(a, b) for x, y in pairs for a, b in zip(x.chunk(64), y.chunk(64), strict=True)]

    def copy(index: int) -> None:
        for here, there in pairs[index::threads]:
            here.copy_(there)

    _in_threads(copy, threads)


def serve(tensors: Mapping[str, torch.Tensor]) -> None:
    """Serve over raw TCP, and print the addresses of all tensors, until standard input closes."""
    groups = groups_of(tensors)
    listener = socket.create_server(("127.0.0.1", 0))
    ready = {"port": listener.getsockname()[1], "pid": os.getpid(), "addresses": addresses_of(groups)}
    print(json.dumps(ready), flush=True)

    def send(stream: socket.socket) -> None:
        with stream:
            _tune(stream)
            index, streams, bounded = stream.recv(3, socket.MSG_WAITALL)
            if bounded:
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BOUNDED_BYTES)
            for group in groups[index::streams]:
                _whole(stream.sendmsg, group)

    def accept() -> None:
        while True:
            stream, _ = listener.accept()
            threading.Thread(target=send, args=(stream,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()


class RawCases:
    """The raw cases that fill one set of tensors from one raw server.

    Args:
        ready: What the server process printed.
        tensors: What to fill.
    """

    def __init__(self, ready: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        self._ready = ready
        self._tensors = tensors
        self._groups = groups_of(tensors)
        self._local = [_iovecs(group) for group in addresses_of(self._groups)]
        self._remote = [_iovecs([(base, length) for base, length in group]) for group in ready["addresses"]]
        self._copy: Mapping[str, torch.Tensor] | None = None

    def run(self, case: str) -> None:
        """Move all bytes once, by one of :data:`RAW_CASES`."""
        kind, _, count = case.rpartition("_")
        if kind.startswith("raw_tcp"):
            tcp_pull(self._ready["port"], self._groups, int(count), bounded=kind == "raw_tcp_bounded")
        elif kind == "read_memory":
            read_memory(self._ready["pid"], self._remote, self._local, int(count))
        else:
            if self._copy is None:
                self._copy = {name: tensor.clone() for name, tensor in self._tensors.items()}
            memcpy(self._copy, self._tensors, int(count))


RAW_CASES = tuple(
    f"{kind}_{count}" for kind in ("raw_tcp", "raw_tcp_bounded", "read_memory", "memcpy") for count in (1, 2)
)
"""How it is done, and by how many streams or threads."""


def main() -> None:
    """Run the server process."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("workload")
    parser.add_argument("--scale", type=float, default=1.0)
    args = parser.parse_args()
    serve(make(args.workload, args.scale, fill=True))


if __name__ == "__main__":
    main()
