from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloader.codecs.regions import regions_over
from netloader.errors import ChannelClosed, PeerLost, TransferTimeout, TransportError, TransportUnavailable
from netloader.transports.base import Channel
from netloader.transports.conformance import CHECKS, Check, TensorBlockView, check_transport, pair_maker
from netloader.transports.io.operation import Operation
from netloader.transports.shm import ShmTransport, handshake, process_memory
from netloader.transports.shm import transport as shm
from netloader.transports.shm.control_socket import ControlSocket
from netloader.transports.shm.pipe import PIPE_BYTES, PipeEnd
from netloader.transports.shm.remote_memory import PipeReader, PipeWriter
from tests.transports.bytesview import BytesView, Pieces, like
from tests.transports.pairs import opened
from tests.transports.test_tcp import grouping, groups, numbered, setup, spans

ROOT = Path(__file__).parents[2]
ways = pytest.mark.parametrize("reading", [True, False], ids=["read", "pipes"])


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@ways
async def test_conformance(reading: bool, check: Check) -> None:
    await check_transport(pair_maker(ShmTransport(reading=reading)), [check])


@given(
    data=st.lists(spans, max_size=8),
    sent=grouping,
    received=grouping,
    threads=st.integers(1, 4),
    here=st.booleans(),
    there=st.booleans(),
)
def test_any_blocks_in_any_grouping_arrive_in_order(
    data: list[list[bytes]], sent: list[int], received: list[int], threads: int, here: bool, there: bool
) -> None:
    blocks = [BytesView(number, *parts) for number, parts in enumerate(data)]
    into = like(blocks)
    seen: list[int] = []
    transports = ShmTransport(reading=here, threads=threads), ShmTransport(reading=there, threads=threads)

    async def main() -> None:
        async with opened(*transports) as (server, client), anyio.create_task_group() as tasks:

            async def send() -> None:
                for group in groups(blocks, sent):
                    await server.send(group)

            tasks.start_soon(send)
            for group in groups(into, received):
                await client.recv(group, lambda block: seen.append(block.number))

    anyio.run(main)
    assert [block.data for block in into] == [block.data for block in blocks]
    assert sorted(seen) == list(range(len(blocks)))


@ways
async def test_large_blocks_many_spans_and_other_cuts(reading: bool, no_leaked_descriptors: None) -> None:
    many = BytesView(1, *(bytes([number % 251]) * (number % 7) for number in range(5000)))
    blocks = [
        BytesView(0, bytes(range(256)) * 40_000),
        many,
        BytesView(2, b"x" * 300_000, b"", b"y" * (4 * PIPE_BYTES)),
    ]
    # The same bytes arrive when the receiver groups them into other calls.
    into = [
        BytesView(0, bytes(1), bytes(256 * 40_000 - 1)),
        BytesView(1, bytes(many.nbytes - 3000), *(b"\0" for _ in range(3000))),
        BytesView(2, bytes(blocks[2].nbytes)),
    ]
    async with opened(ShmTransport(reading=reading)) as (server, client), anyio.create_task_group() as tasks:
        tasks.start_soon(server.send, blocks)
        await client.recv(into)
    assert [block.data for block in into] == [block.data for block in blocks]


async def test_thousands_of_tiny_sends_that_nobody_waits_for() -> None:
    blocks = numbered(250, 1) * 8
    into = like(blocks)
    async with opened(ShmTransport(reading=False)) as (server, client), anyio.create_task_group() as tasks:

        async def send() -> None:
            for block in blocks:
                await server.send([block])

        tasks.start_soon(send)
        for start in range(0, len(into), 500):
            await client.recv(into[start : start + 500])
    assert b"".join(block.data for block in into) == b"".join(block.data for block in blocks)


async def test_the_sender_waits_until_its_memory_was_read() -> None:
    async with opened(ShmTransport()) as (server, client), anyio.create_task_group() as tasks:
        done = anyio.Event()

        async def send() -> None:
            await server.send(numbered(2, 10))
            done.set()

        tasks.start_soon(send)
        into = like(numbered(2, 10))
        await client.recv(into[:1])
        await anyio.wait_all_tasks_blocked()
        assert not done.is_set()
        await client.recv(into[1:])
        await done.wait()
        assert [block.data for block in into] == [block.data for block in numbered(2, 10)]


async def test_blocks_of_another_size_are_refused() -> None:
    async with opened(ShmTransport()) as (server, client), anyio.create_task_group() as tasks:

        async def send() -> None:
            with pytest.raises(PeerLost):
                await server.send(numbered(1, 10))

        tasks.start_soon(send)
        into = BytesView(0, bytes(11))
        with pytest.raises(TransportError, match=r"announced 10 bytes as block 0 of 11 bytes"):
            await client.recv([into])
        assert into.data == bytes(11)
        await client.aclose()


@ways
async def test_a_peer_that_neither_sends_nor_receives_is_detected(reading: bool) -> None:
    async with opened(ShmTransport(reading=reading), stall=0.1) as (server, client):
        with pytest.raises(TransferTimeout, match="sends nothing"):
            await client.recv(like(numbered(3, 10)))
        with pytest.raises(PeerLost):
            await server.send(numbered(2, 5_000_000))
    async with opened(ShmTransport(reading=reading), stall=0.1) as (server, client):
        with pytest.raises(TransferTimeout, match="takes no bytes"):
            await server.send(numbered(2, 5_000_000))
        with pytest.raises(ChannelClosed):
            await server.send([])


def sockets_with_our_names() -> list[str]:
    text = Path("/proc/net/unix").read_text("utf-8")
    return [line.split()[-1] for line in text.splitlines() if "@netloader-" in line]


async def test_nothing_with_a_name_is_left(no_leaked_descriptors: None, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    token_hex = secrets.token_hex

    def noted(nbytes: int) -> str:
        names.append(token_hex(nbytes))
        return names[-1]

    monkeypatch.setattr(secrets, "token_hex", noted)
    async with opened(ShmTransport(reading=False)) as (server, client), anyio.create_task_group() as tasks:
        tasks.start_soon(server.send, numbered(3, 100_000))
        await client.recv(like(numbered(3, 100_000)))
        assert not [found for found in os.listdir("/dev/shm") if "netloader" in found]  # noqa: PTH208
    assert names
    assert not [found for found in sockets_with_our_names() if any(name in found for name in names)]


async def test_unauthenticated_peers_are_not_accepted() -> None:
    transport = ShmTransport()
    pending = await transport.offer(setup(0.3))
    wanted = msgspec.msgpack.decode(pending.offer, type=shm._ShmOffer)
    wrong = msgspec.msgpack.encode(msgspec.structs.replace(wanted, key=bytes(16)))

    async def accept() -> None:
        with pytest.raises(TransferTimeout):
            await pending.accept()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(accept)
        with pytest.raises(PeerLost, match="data connection"):
            await transport.connect(wrong, setup())


@pytest.mark.parametrize("how", ["given up", "too late", "cancelled"])
async def test_the_listener_closes_when_no_peer_connects(how: str, no_leaked_descriptors: None) -> None:
    transport = ShmTransport()
    pending = await transport.offer(setup(0.05 if how == "too late" else 20))
    if how == "given up":
        await pending.aclose()
        await pending.aclose()
    elif how == "too late":
        with pytest.raises(TransferTimeout):
            await pending.accept()
    else:
        with anyio.move_on_after(0.05):
            await pending.accept()
    with pytest.raises(TransportUnavailable, match="within this host"):
        await transport.connect(pending.offer, setup())


@pytest.mark.parametrize("offer", [b"", b"\xc1", b"\x90", msgspec.msgpack.encode(["", bytes(16), bytes(16)])])
async def test_invalid_offers_are_refused(offer: bytes) -> None:
    with pytest.raises(TransportError, match="invalid"):
        await ShmTransport().connect(offer, setup())


SERVER = """
import asyncio, ctypes, os, signal, sys, anyio, anyio._backends._asyncio
from netloader.transports.shm import ShmTransport
from tests.transports.bytesview import BytesView
from tests.transports.test_tcp import setup

async def main(reading):
    transport = ShmTransport(reading=reading)
    pending = await transport.offer(setup())
    print(pending.offer.hex(), flush=True)
    channel = await pending.accept()
    if FORK:
        if os.fork() == 0:  # keeps every descriptor open until the reader of the output closes it
            os.write(1, b"%d\\n" % os.getpid())
            signal.pause()
    await channel.send([BytesView(0, bytes([7]) * 1000)])
    print("sent", flush=True)
    await channel.recv([BytesView(0, bytes(10))])

FORK = False
SETUP
anyio.run(main, READING)
"""


@contextmanager
def server(reading: bool, preparation: str = "") -> Iterator[subprocess.Popen[str]]:
    program = SERVER.replace("SETUP", preparation).replace("READING", str(reading))
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


async def pulled(channel: Channel) -> None:
    into = BytesView(0, bytes(1000))
    await channel.recv([into])
    assert into.data == bytes([7]) * 1000


@pytest.mark.allow_blocking(reason="talks to a process of its own")
@ways
async def test_a_killed_server_is_lost_at_once_and_leaves_nothing(reading: bool) -> None:
    with server(reading) as process:
        offer = bytes.fromhex(line_of(process))
        channel = await ShmTransport(reading=reading).connect(offer, setup())
        await pulled(channel)
        assert line_of(process) == "sent"
        process.kill()
        with pytest.raises(PeerLost):
            await channel.recv([BytesView(1, bytes(10))])
        await channel.aclose()
        process.wait()
    name = msgspec.msgpack.decode(offer, type=shm._ShmOffer).name
    assert not [found for found in sockets_with_our_names() if name in found]
    assert not [found for found in os.listdir("/dev/shm") if "netloader" in found]  # noqa: PTH208


@pytest.mark.allow_blocking(reason="talks to a process of its own")
async def test_a_child_of_the_server_does_not_hide_its_death() -> None:
    with server(True, "FORK = True") as process:
        channel = await ShmTransport().connect(bytes.fromhex(line_of(process)), setup())
        child = int(line_of(process))
        try:
            await pulled(channel)
            process.send_signal(signal.SIGKILL)
            with pytest.raises(PeerLost):
                await channel.recv([BytesView(1, bytes(10))])
            await channel.aclose()
        finally:
            os.kill(child, signal.SIGKILL)


async def test_a_user_at_the_limit_of_pipes_gets_smaller_ones_that_work(
    monkeypatch: pytest.MonkeyPatch, no_leaked_descriptors: None
) -> None:
    def refused(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETPIPE_SZ:
            return set_flag(fd, command, 4096)
        return set_flag(fd, command, argument)

    set_flag = fcntl.fcntl
    monkeypatch.setattr(fcntl, "fcntl", refused)
    blocks = [BytesView(0, os.urandom(1_000_001)), BytesView(1), *(BytesView(n, b"x" * n) for n in range(2, 40))]
    into = like(blocks)
    async with opened(ShmTransport(reading=False)) as (server, client), anyio.create_task_group() as tasks:
        tasks.start_soon(server.send, blocks)
        await client.recv(into)
    assert [block.data for block in into] == [block.data for block in blocks]


# Two pipes of the server and one of the client. Each end has a control socket and a descriptor of the peer's process.
@pytest.mark.parametrize(
    ("call", "which", "enough"),
    [*(("pipe2", which, which > 3) for which in range(1, 5)), *(("dup", which, which > 6) for which in range(1, 8))],
)
async def test_without_descriptors_there_is_no_channel_and_nothing_is_left(
    call: str, which: int, enough: bool, monkeypatch: pytest.MonkeyPatch, no_leaked_descriptors: None
) -> None:
    made = 0
    make = getattr(os, call)

    def exhausted(argument: int) -> object:
        nonlocal made
        made += 1
        if made == which:
            raise OSError(errno.EMFILE, "Too many open files")
        return make(argument)

    monkeypatch.setattr(os, call, exhausted)
    transport, errors = ShmTransport(reading=False), list[TransportError]()
    pending = await transport.offer(setup())

    async def open_and_close(opening: Awaitable[Channel]) -> None:
        try:
            await (await opening).aclose()
        except TransportError as error:
            errors.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(open_and_close, pending.accept())
        tasks.start_soon(open_and_close, transport.connect(pending.offer, setup()))
    assert bool(errors) is not enough
    assert enough or any("Too many open files" in str(error) for error in errors)


@pytest.mark.parametrize("given", ["a ring", "no pipe", "one without its line", "none", "nothing"])
async def test_a_descriptor_that_is_not_a_pipe_is_refused(given: str, no_leaked_descriptors: None) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reading, writing = PipeEnd.pair()
    file = os.memfd_create("netloader-test")
    try:
        ours.setblocking(False)
        theirs.setblocking(False)
        if given == "nothing":
            ours.close()
            with pytest.raises(PeerLost, match="left while a channel"):
                await handshake._receive_descriptors(theirs)
            return
        descriptors = {
            "a ring": [file],  # what a server of an earlier version passes
            "no pipe": [file, ours.fileno()],
            "one without its line": [reading.fileno()],
            "none": [],
        }[given]
        socket.send_fds(ours, [b"ring" if given == "a ring" else b"pipes"], descriptors)
        with pytest.raises(TransportUnavailable, match="did not send the pipes"):
            await handshake._receive_descriptors(theirs)
    finally:
        ours.close()
        theirs.close()
        reading.close()
        writing.close()
        os.close(file)


@pytest.fixture
def ends() -> Iterator[tuple[PipeWriter, PipeReader, socket.socket, socket.socket]]:
    """Both ends of a pipe, each with a control socket to the test."""
    reading, writing = PipeEnd.pair()
    sent, to_writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    received, to_reader = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    spare = PipeEnd(os.dup(reading.fileno()))
    writer = PipeWriter(ControlSocket(sent, None, 0.2), writing, spare)
    reader = PipeReader(ControlSocket(received, None, 0.2), reading)
    yield writer, reader, to_writer, to_reader
    for end in (writer, reader):
        end.close()
        end.close()
    for sock in (to_writer, to_reader):
        sock.close()


def carried_out(blocks: list[BytesView]) -> Operation:
    return Operation("nothing comes", blocks, None, 0.2, lambda: None)


def test_no_message_is_sent_for_an_empty_block(
    ends: tuple[PipeWriter, PipeReader, socket.socket, socket.socket],
) -> None:
    """The receiver may complete it while the sender is still in the previous call."""
    writer, reader, to_writer, to_reader = ends
    blocks = [BytesView(0), BytesView(1, b"", b"")]
    reader.move(list(enumerate(blocks)), carried_out(blocks))
    to_reader.setblocking(False)
    with pytest.raises(BlockingIOError):
        to_reader.recv(100)
    writer.move(list(enumerate(blocks)), carried_out(blocks))
    to_writer.setblocking(False)
    with pytest.raises(BlockingIOError):
        to_writer.recv(100)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (b"R" + (2).to_bytes(8, "little"), "acknowledged 2 blocks, only 1 were in flight"),
        (b"R" + bytes(8), "acknowledged 0 blocks"),
        (b"R123", " and a number"),
        (b"S" + bytes(8), " and a number"),
    ],
)
def test_invalid_messages_of_a_receiver_are_detected(
    ends: tuple[PipeWriter, PipeReader, socket.socket, socket.socket], word: bytes, message: str
) -> None:
    writer, _, to_writer, _ = ends
    to_writer.send(word)
    blocks = [BytesView(0, bytes(10))]
    with pytest.raises(TransportError, match=message):
        writer.move([(0, blocks[0])], carried_out(blocks))


def test_a_pipe_that_ends_or_a_sender_that_sends_messages_is_an_error(
    ends: tuple[PipeWriter, PipeReader, socket.socket, socket.socket],
) -> None:
    writer, reader, to_writer, to_reader = ends
    into = [BytesView(0, bytes(10)), BytesView(1, bytes(10)), BytesView(2, bytes(10))]
    sent = BytesView(0, b"0123456789")  # not read yet, so the acknowledgement below is wrong
    to_writer.send(b"R" + (1).to_bytes(8, "little"))
    writer.move([(0, sent)], carried_out(into))
    reader.move([(0, into[0])], carried_out(into))
    assert into[0].data == b"0123456789"
    assert to_reader.recv(100) == b"R" + (1).to_bytes(8, "little")
    to_reader.send(b"hello")
    with pytest.raises(TransportError, match="not expected here"):
        reader.move([(1, into[1])], carried_out(into))
    writer.close()
    with pytest.raises(PeerLost, match="its side of the pipe"):
        reader.move([(2, into[2])], carried_out(into))


NOBODY = 65534
UNREADABLE = f"os.setresuid({NOBODY}, {NOBODY}, {NOBODY}); ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)"
CLIENT = """
import asyncio, os, sys, anyio, anyio._backends._asyncio, logging
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from netloader.transports.shm import ShmTransport
from tests.transports.test_shm import pulled, setup

async def main(offer):
    channel = await ShmTransport().connect(bytes.fromhex(offer), setup())
    await pulled(channel)
    await channel.aclose()
    print("pulled", flush=True)

os.setresuid(NOBODY, NOBODY, NOBODY)
anyio.run(main, sys.argv[1])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.allow_blocking(reason="talks to processes of its own")
async def test_where_reading_is_forbidden_bytes_come_through_pipes() -> None:
    with server(True, UNREADABLE) as process:
        program = CLIENT.replace("NOBODY", str(NOBODY))
        arguments = [sys.executable, "-c", program, line_of(process)]
        done = subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=60, cwd=ROOT)  # noqa: ASYNC221
        assert "pulled" in done.stdout, done.stdout + done.stderr
        assert "Operation not permitted" in done.stdout


@pytest.mark.allow_blocking(reason="talks to processes of its own")
async def test_from_another_pid_namespace_bytes_come_through_pipes() -> None:
    elsewhere = ["unshare", "--pid", "--fork", "--mount-proc"]
    works = [*elsewhere, "true"]
    if not shutil.which("unshare") or subprocess.run(works, check=False, capture_output=True, timeout=60).returncode:  # noqa: ASYNC221
        pytest.skip("this user may not make a pid namespace")
    with server(True) as process:
        program = CLIENT.replace("os.setresuid(NOBODY, NOBODY, NOBODY)", "")
        arguments = [*elsewhere, sys.executable, "-c", program, line_of(process)]
        done = subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=60, cwd=ROOT)  # noqa: ASYNC221
        assert "pulled" in done.stdout, done.stdout + done.stderr
        assert "is not visible from here" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.allow_blocking(reason="talks to a process of its own")
async def test_another_user_is_refused() -> None:
    with server(True, UNREADABLE) as process:
        offer = bytes.fromhex(line_of(process))
        with pytest.raises(TransportUnavailable, match="is not trusted: it belongs to user 65534"):
            await ShmTransport().connect(offer, setup())


class _Calls:
    """The C library, with a record of each call."""

    def __init__(self, real: Any, made: list[str]) -> None:
        self._real = real
        self._made = made

    def __getattr__(self, name: str) -> Any:
        self._made.append(name)
        return getattr(self._real, name)


async def test_channels_to_several_peers_leave_the_permission_to_trace_this_process_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is one setting for the whole process, which can't be queried, and other code may have set it."""
    made: list[str] = []
    real = process_memory._libc()
    monkeypatch.setattr(process_memory, "_libc", lambda: _Calls(real, made))
    read_text = Path.read_text

    def like_yama(path: Path, *arguments: Any, **options: Any) -> str:
        return "1" if path.name == "ptrace_scope" else read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", like_yama)
    async with opened(ShmTransport()) as one:
        async with opened(ShmTransport()) as other:
            await _moves(*other)
            await _moves(*one)
        await _moves(*one)
    assert set(made) == {"process_vm_readv"}


async def _moves(server: Channel, client: Channel) -> None:
    sent, into = TensorBlockView(0, [b"blocks"]), TensorBlockView(0, [bytes(6)])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.send, [sent])
        await client.recv([into])
    assert into.data == sent.data


@given(
    remote=st.lists(st.integers(0, 5000), min_size=1, max_size=1500),
    cut=st.integers(1, 3000),
)
def test_regions_of_any_shape_are_read(remote: list[int], cut: int) -> None:
    data = bytearray(os.urandom(max(sum(remote), 1)))
    there, start = [], 0
    for nbytes in remote:
        there.append(memoryview(data)[start : start + nbytes])
        start += nbytes
    into = bytearray(start)
    here = [memoryview(into)[at : at + cut] for at in range(0, start, cut)]
    process_memory.read(os.getpid(), Pieces(*there).regions(), Pieces(*here).regions())
    assert into == data[:start]


def test_reading_unmapped_memory_is_an_error() -> None:
    into = memoryview(bytearray(10))
    here = Pieces(into).regions()
    with pytest.raises(TransportError, match="can't be read"):
        process_memory.read(os.getpid(), regions_over([8], [10]), here)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        with pytest.raises(PeerLost):
            process_memory.read(process.pid, here, here)


def test_its_name_facts_and_requirements() -> None:
    transport = ShmTransport()
    assert transport.missing("cpu") is None
    assert "not on npu:0" in (transport.missing("npu:0") or "")
    assert set(transport.facts("cpu")) == {"host", "network namespace", "user"}
    assert transport.facts("cpu") == ShmTransport().facts("cpu")
