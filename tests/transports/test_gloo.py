from __future__ import annotations

import os
import signal
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import anyio.abc
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from netloader.errors import PeerLost, TransferTimeout, TransportError
from netloader.transports.base import Channel
from netloader.transports.conformance import (
    LocalSignals,
    TensorBlockView,
    check_transport,
    local_signals,
    pair_maker,
)
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport
from netloader.transports.gloo import GlooTransport
from netloader.transports.gloo import messages as m
from netloader.transports.gloo import packet_filter as guard
from netloader.transports.gloo import transport as gloo
from netloader.transports.gloo.addresses import Address, plain_host
from netloader.transports.gloo.link import GlooLink
from netloader.transports.gloo.processes import SessionProcess, Spawner
from netloader.transports.gloo.rendezvous import from_blob, to_blob
from tests.preloaded import PYTHON
from tests.transports import peer
from tests.transports.bare_gloo import CLIENT, BareGloo
from tests.transports.pairs import opened, setup_for

ROOT = Path(__file__).parents[2]
GLOO = GlooTransport()
"""One for all tests, because its first session takes a second."""
MIB = 1 << 20
BLOCKS = [TensorBlockView(number, [bytes([number + 1]) * size]) for number, size in enumerate((1, 3 * MIB, 70_000))]


def have_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def empty() -> list[TensorBlockView]:
    return [TensorBlockView.zeros(block.number, block.nbytes) for block in BLOCKS]


def is_free(host: str, port: int) -> bool:
    """Whether no process listens at this address."""
    with socket.socket() as sock:
        try:
            sock.bind((host, port))
        except OSError:
            return False
    return True


async def carry(server: Channel, client: Channel) -> None:
    into = empty()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.send, BLOCKS)
        await client.recv(into)
    assert [block.data for block in into] == [block.data for block in BLOCKS]


def parsed(offer: bytes) -> Address:
    note = gloo._decode(offer)
    assert isinstance(note, Address)
    return note


# --- addresses --------------------------------------------------------------------------------------------------------

hosts = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)


@given(host=hosts, port=st.integers(0, 65535), pairs=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4))
def test_an_address_round_trips_through_gloos_format(host: str, port: int, pairs: list[int]) -> None:
    address = Address(host, port, tuple(pairs))
    assert from_blob(to_blob(address)) == address


@given(st.binary(max_size=400))
@example(b"\xff" * 170)
@example(to_blob(Address("::1", 1, (0, 1)))[:-3])
def test_an_unknown_format_is_one_clean_error(blob: bytes) -> None:
    with pytest.raises(TransportError, match="unknown format"):
        from_blob(blob)


def test_hosts_are_compared_in_canonical_form() -> None:
    assert plain_host("::ffff:10.0.0.1") == plain_host("10.0.0.1") == "10.0.0.1"
    assert plain_host("fe80::1%eth0") == plain_host("FE80:0::1")
    with pytest.raises(TransportError, match="numeric"):
        plain_host("example.org")


@pytest.mark.skipif(not have_ipv6(), reason="no IPv6 here")
async def test_gloo_works_over_ipv6() -> None:
    async with opened(GLOO, host="::1") as (server, client):
        await carry(server, client)


async def test_it_listens_at_the_address_of_the_control_connection_only() -> None:
    ours, theirs = local_signals()
    pending = await GLOO.offer(setup_for(ours, host="127.0.0.7"))
    address = parsed(pending.offer)
    assert address.host == "127.0.0.7"
    assert not is_free("127.0.0.7", address.port)
    assert is_free("127.0.0.8", address.port)
    await pending.aclose()
    assert is_free("127.0.0.7", address.port)
    ours.close()
    theirs.close()


async def test_gloo_connects_only_to_the_peer() -> None:
    """A server does not connect to a client that names another host than its own."""
    with socket.create_server(("127.0.0.2", 0)) as elsewhere:
        elsewhere.setblocking(False)
        ours, theirs = local_signals()
        transport = GLOO
        pending = await transport.offer(setup_for(ours))
        await theirs.post(gloo._encode(Address("127.0.0.2", elsewhere.getsockname()[1], (2, 3))))
        with pytest.raises(TransportError, match=r"127\.0\.0\.2.*127\.0\.0\.1"):
            await pending.accept()
        with pytest.raises(BlockingIOError):
            elsewhere.accept()
        # The client gets an error, and a client checks the address of a server in the same way.
        with pytest.raises(PeerLost, match=r"gave up.*127\.0\.0\.2"):
            gloo._expect(gloo._Taken, await theirs.fetch())
        with pytest.raises(TransportError, match=r"127\.0\.0\.2.*127\.0\.0\.1"):
            await transport.connect(
                gloo._encode(Address("127.0.0.2", elsewhere.getsockname()[1], (2, 3))), setup_for(theirs)
            )
        with pytest.raises(BlockingIOError):
            elsewhere.accept()
        ours.close()
        theirs.close()


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"\x00" * 50,
        gloo._encode(gloo._Taken()),
        gloo._encode(Address("127.0.0.1", 0, (2, 3))),
        gloo._encode(Address("127.0.0.1", 70_000, (2, 3))),
        gloo._encode(Address("127.0.0.1", 80, (2,))),
        gloo._encode(Address("localhost", 80, (2, 3))),
        gloo._encode(Address("127.0.0.1", 80, (2**64 - 1, 3))),
        gloo._encode(Address("127.0.0.1", 80, (2, 3), dials_from="localhost")),
    ],
)
async def test_an_invalid_message_ends_the_set_up(note: bytes) -> None:
    ours, theirs = local_signals()
    transport = GLOO
    pending = await transport.offer(setup_for(ours))
    await theirs.post(note)
    with pytest.raises(TransportError):
        await pending.accept()
    with pytest.raises(TransportError):
        await transport.connect(note, setup_for(theirs))
    ours.close()
    theirs.close()


# --- set-up that fails ------------------------------------------------------------------------------------------------


async def test_a_client_that_does_not_connect_times_out() -> None:
    ours, theirs = local_signals()
    transport = GLOO
    await (await transport.offer(setup_for(ours))).aclose()  # the first session has to wait until torch is loaded
    pending = await transport.offer(setup_for(ours, timeout=0.1))
    with pytest.raises(TransferTimeout):
        await pending.accept()
    await pending.aclose()
    ours.close()
    theirs.close()


async def test_a_client_whose_control_connection_ends() -> None:
    ours, theirs = local_signals()
    transport = GLOO
    pending = await transport.offer(setup_for(ours))
    theirs.close()
    with pytest.raises(PeerLost):
        await pending.accept()
    ours.close()


async def test_a_peer_that_sends_its_address_and_never_connects() -> None:
    """Gloo can't be interrupted while it connects, so the time for that is short."""
    ours, theirs = local_signals()
    transport = GLOO
    with socket.create_server(("127.0.0.1", 0)) as silent:
        pending = await transport.offer(setup_for(ours, timeout=0.3))
        await theirs.post(gloo._encode(Address("127.0.0.1", silent.getsockname()[1], parsed(pending.offer).pairs)))
        with pytest.raises(TransportError):
            await pending.accept()
    ours.close()
    theirs.close()


async def test_a_set_up_that_waits_for_the_peers_connection_can_be_cancelled() -> None:
    ours, theirs = local_signals()
    transport = GLOO
    pending = await transport.offer(setup_for(ours))
    # The side with the lower address waits: 65535 is the highest port.
    await theirs.post(gloo._encode(Address("127.0.0.1", 65_535, parsed(pending.offer).pairs)))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pending.accept)
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(gloo._CONNECTING / 2, shield=True):
            tasks.cancel_scope.cancel()
            await pending.aclose()
    ours.close()
    theirs.close()


class Counted:
    """Signals that cancel a scope when they are used for the n-th time, by either end."""

    def __init__(self, inner: LocalSignals, uses: list[int], at: int, scope: anyio.CancelScope) -> None:
        self._inner, self._uses, self._at, self._scope = inner, uses, at, scope

    def _use(self) -> None:
        if len(self._uses) == self._at:
            self._scope.cancel()
        self._uses.append(self._at)

    async def post(self, data: bytes) -> None:
        self._use()
        await self._inner.post(data)

    async def fetch(self) -> bytes:
        self._use()
        return await self._inner.fetch()


async def set_up_cancelled(at: int) -> bool:
    ours, theirs = local_signals()
    uses: list[int] = []
    transport = GLOO
    channels: list[Channel] = []
    with anyio.CancelScope() as scope:
        pending = await transport.offer(setup_for(Counted(ours, uses, at, scope)))
        try:
            async with anyio.create_task_group() as tasks:

                async def accept() -> None:
                    channels.append(await pending.accept())

                tasks.start_soon(accept)
                channels.append(await transport.connect(pending.offer, setup_for(Counted(theirs, uses, at, scope))))
        finally:
            with anyio.CancelScope(shield=True):
                await pending.aclose()
                for channel in channels:
                    await channel.aclose()
    ours.close()
    theirs.close()
    return scope.cancelled_caught


async def test_cancelled_at_any_point_of_the_set_up_nothing_is_left(no_leaked_descriptors: None) -> None:
    at = 0
    while await set_up_cancelled(at):
        at += 1
    assert at >= 6  # address, two ends compared, the final message: each sent and received


# --- unauthenticated peers --------------------------------------------------------------------------------------------

OPCODES = range(5)


def messages(number: int) -> list[list[bytes]]:
    """What an attacker who knows gloo's protocol may send: the right number first, then unrequested operations."""
    hello = struct.pack("=q", number)
    return [
        [],
        [bytes(range(256)) * 64],
        [hello],
        [hello] * 20,
        *[[hello, struct.pack("=6Q", 48 + 8, opcode, 0, 0, 8, 0) + b"x" * 8] for opcode in OPCODES],
        *[[hello + struct.pack("=6Q", 48, opcode, 2**63, 2**62, 2**61, 2**60)] for opcode in OPCODES],
    ]


def say(address: Address, message: list[bytes], *, reset: bool) -> socket.socket | None:
    """Connect from a thread, and send each part in a separate packet. Stay connected, or reset the connection."""
    sock = socket.create_connection((address.host, address.port), timeout=5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for part in message:
        sock.sendall(part)
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        return None
    return sock


def before_the_peer(strangers: list[socket.socket], reset: bool, kind: int) -> Callable[[Address], None]:
    def visit(address: Address) -> None:
        for number in address.pairs:
            sock = say(address, messages(number)[kind], reset=reset)
            if sock is not None:
                strangers.append(sock)

    return visit


@pytest.mark.parametrize("reset", [False, True], ids=["stays", "resets"])
@pytest.mark.parametrize("kind", range(len(messages(0))))
async def test_an_unauthenticated_peer_that_connects_first_ends_this_session_at_most(kind: int, reset: bool) -> None:
    """At the ports of both ends, before the peer. Without protection gloo would end this process in some cases."""
    strangers: list[socket.socket] = []
    visit = before_the_peer(strangers, reset, kind)
    async with opened(GLOO) as (other_server, other_client):
        transport = GLOO
        ours, theirs = local_signals()
        pending = await transport.offer(setup_for(ours, timeout=2))
        await anyio.to_thread.run_sync(visit, parsed(pending.offer))

        class Watched:
            """The client's address is known to an attacker before the server has it."""

            async def post(self, data: bytes) -> None:
                if isinstance(gloo._decode(data), Address):
                    await anyio.to_thread.run_sync(visit, parsed(data))
                await theirs.post(data)

            async def fetch(self) -> bytes:
                return await theirs.fetch()

        ends: list[Channel] = []
        errors: list[TransportError] = []

        async def end(opening: Callable[[], Awaitable[Channel]]) -> None:
            try:
                ends.append(await opening())
            except TransportError as error:
                errors.append(error)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(end, pending.accept)
            tasks.start_soon(end, lambda: transport.connect(pending.offer, setup_for(Watched(), timeout=2)))
        assert len(ends) in {0, 2}, f"one side believes in it, the other does not: {errors}"
        for channel in ends:
            await channel.aclose()
        await carry(other_server, other_client)
    for sock in strangers:
        sock.close()
    ours.close()
    theirs.close()


async def test_an_open_channel_accepts_no_more_connections() -> None:
    addresses: list[Address] = []
    ours, theirs = local_signals()
    transport = GLOO
    pending = await transport.offer(setup_for(ours))

    class Watched:
        async def post(self, data: bytes) -> None:
            note = gloo._decode(data)
            if isinstance(note, Address):
                addresses.append(note)
            await theirs.post(data)

        async def fetch(self) -> bytes:
            return await theirs.fetch()

    ends: list[Channel] = []
    async with anyio.create_task_group() as tasks:

        async def accept() -> None:
            ends.append(await pending.accept())

        tasks.start_soon(accept)
        client = await transport.connect(pending.offer, setup_for(Watched()))
    for address in (parsed(pending.offer), *addresses):
        with socket.socket() as sock:
            sock.setblocking(False)
            sock.connect_ex((address.host, address.port))
            await carry(ends[0], client)
            # On loopback an accepted connection is up at once; this one gets no answer.
            with pytest.raises(OSError, match="not connected"):
                sock.getpeername()
    await ends[0].aclose()
    await client.aclose()
    ours.close()
    theirs.close()


async def test_an_unauthenticated_peer_on_another_host_gets_no_answer() -> None:
    ours, theirs = local_signals()
    pending = await GLOO.offer(setup_for(ours))
    address = parsed(pending.offer)
    with socket.socket() as sock:
        sock.bind(("127.0.0.3", 0))  # not the peer's address
        sock.setblocking(False)
        sock.connect_ex((address.host, address.port))
        with pytest.raises(OSError, match="not connected"):
            sock.getpeername()
    await pending.aclose()
    ours.close()
    theirs.close()


async def test_without_filters_it_works_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(sock: socket.socket, program: object) -> None:
        raise OSError("no filters here")

    monkeypatch.setattr(guard, "_attach", refuse)
    ours, theirs = local_signals()
    pending = await GLOO.offer(setup_for(ours))
    client = BareGloo(CLIENT, theirs)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.connect, pending.offer)
        channel = await pending.accept()
    assert client.group.unfiltered == "no filters here"
    await channel.aclose()
    await client.aclose()
    ours.close()
    theirs.close()


def test_a_port_without_a_filter_is_logged_as_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    link = GlooLink(Scripted(m.Published(Address("127.0.0.1", 1234, (2, 3)), "no filters here")))
    link.open(OPEN)
    link.close()
    assert "the kernel can't filter connections to gloo's port 1234: no filters here" in caplog.text


# --- what the peer does -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FaultKind.DROP, FaultKind.TRUNCATE, FaultKind.SWAP])
async def test_blocks_of_other_lengths_than_expected_end_the_session_only(kind: FaultKind) -> None:
    """Without protection gloo ends the process when more bytes arrive than were requested."""
    faults = Faults([Fault(kind, 0, byte=1, other=1)])
    faulty = FaultyTransport(GLOO, faults)
    sent = [TensorBlockView(0, [b"12"]), TensorBlockView(1, [b"345"]), TensorBlockView(2, [b"6"])]
    into = [TensorBlockView.zeros(block.number, block.nbytes) for block in sent]
    async with opened(faulty, GLOO, stall=0.3) as (server, client), anyio.create_task_group() as tasks:

        async def send() -> None:
            with suppress(TransportError):
                await server.send(sent)

        tasks.start_soon(send)
        if kind is FaultKind.SWAP:  # of different sizes: a swap is not possible
            await client.recv(into)
            assert faults.fired == ()
        else:
            with pytest.raises(TransferTimeout):
                await client.recv(into)


@asynccontextmanager
async def other_process() -> AsyncIterator[tuple[anyio.abc.Process, Channel]]:
    """A server in a separate process that sends for ever, and a channel to it."""
    with socket.create_server((peer.HOST, 0)) as listener:
        listener.setblocking(False)
        command = [PYTHON, "-m", "tests.transports.peer", str(listener.getsockname()[1])]
        async with await anyio.open_process(command, cwd=ROOT, stderr=None) as process:
            await anyio.wait_readable(listener)
            async with await anyio.abc.SocketStream.from_socket(listener.accept()[0]) as stream:
                setup = peer.setup_over(stream, stall=1.0)
                channel = await GLOO.connect(await setup.signals.fetch(), setup)
                try:
                    yield process, channel
                finally:
                    await channel.aclose()
                    if process.returncode is None:
                        process.kill()


def numbered(number: int) -> TensorBlockView:
    return TensorBlockView(number, [bytes(MIB)])


async def receive_for_ever(channel: Channel, seen: anyio.Event) -> None:
    for number in range(1, 1 << 20):
        await channel.recv([numbered(number)])
        seen.set()


async def test_gloo_works_between_processes(no_leaked_descriptors: None) -> None:
    async with other_process() as (process, channel):
        for start in range(0, 60, 20):
            into = [numbered(number) for number in range(start, start + 20)]
            await channel.recv(into)
            assert all(block.data == bytes([block.number]) * MIB for block in into)
        await channel.aclose()
        assert process.stdout is not None
        assert await process.stdout.receive() == b"PeerLost\n"
        assert await process.wait() == 0


async def test_a_killed_peer_is_detected() -> None:
    async with other_process() as (process, channel):
        await channel.recv([numbered(0)])
        async with anyio.create_task_group() as tasks:
            seen = anyio.Event()

            async def receive() -> None:
                with pytest.raises(PeerLost):
                    await receive_for_ever(channel, seen)

            tasks.start_soon(receive)
            await seen.wait()
            process.send_signal(signal.SIGKILL)
            with anyio.fail_after(10):
                await process.wait()


async def test_a_stopped_peer_is_given_up() -> None:
    async with other_process() as (process, channel):
        await channel.recv([numbered(0)])
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(TransferTimeout, match="1 s"):
            await receive_for_ever(channel, anyio.Event())


async def test_conformance_of_the_ipv6_kind() -> None:
    if not have_ipv6():
        pytest.skip("no IPv6 here")
    await check_transport(pair_maker(GLOO, host="::1"))


def test_gloo_moves_host_memory_only() -> None:
    assert GLOO.missing("cpu") is None
    assert "npu:3" in str(GLOO.missing("npu:3"))


# --- the process in which gloo runs -----------------------------------------------------------------------------------

OPEN = m.Open(0, "127.0.0.1", "127.0.0.1", 1.0)


class Scripted(Spawner):
    """Starts nothing, and gives this answer to the first command."""

    def __init__(self, reply: m.Reply | bytes) -> None:
        super().__init__()
        self.sending, self._end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._end.send(reply if isinstance(reply, bytes) else m.encode(reply))

    def start(self) -> SessionProcess:
        return self  # type: ignore[return-value]

    def kill(self) -> None:
        self._end.close()

    def gone(self, within: float) -> bool:
        return True

    def close(self) -> None:
        self.sending.close()


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (m.Failed("lost", "gone", "look"), PeerLost("gone", hint="look")),
        (m.Failed("timeout", "late"), TransferTimeout("late")),
        (m.Failed("error", "no"), TransportError("no")),
        (m.Done(), TransportError("gloo's process answered Done, not Published")),
        (b"\xc1", TransportError("gloo's process gave an answer that can't be read")),
    ],
)
def test_every_answer_but_the_right_one_is_an_error(reply: m.Reply | bytes, error: TransportError) -> None:
    link = GlooLink(Scripted(reply))
    with pytest.raises(TransportError) as caught:
        link.open(OPEN)
    assert type(caught.value) is type(error)
    assert caught.value.message.startswith(error.message)
    assert caught.value.hint == error.hint
    link.close()


def processes_of(transport: GlooTransport) -> list[int]:
    """The processes of sessions that run."""
    running = transport._spawner._running
    assert running is not None
    process = running.end.peek()
    assert process is not None
    spawner = process[2][0].pid
    return [int(pid) for pid in Path(f"/proc/{spawner}/task/{spawner}/children").read_text().split()]


@pytest.mark.parametrize(
    ("number", "says"), [(signal.SIGKILL, "was ended by SIGKILL"), (signal.SIGSEGV, "was ended by SIGSEGV")]
)
async def test_a_process_that_ends_in_the_middle_is_named_with_the_reason(number: signal.Signals, says: str) -> None:
    async with opened(GLOO) as (server, client):
        await carry(server, client)
        before = processes_of(GLOO)
        async with anyio.create_task_group() as tasks:

            async def receive() -> None:
                with pytest.raises(TransportError, match=says) as caught:
                    await client.recv(empty())
                assert "other sessions are not affected" in caught.value.hint

            tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            os.kill(max(before), number)  # the client's, which was started last
        with pytest.raises(PeerLost):
            await server.recv(empty())


def test_the_last_line_of_a_process_is_in_the_error() -> None:
    spawner = Spawner()
    process = spawner.start()
    process.sending.send(b"\xc1 not a command")
    said = process.obituary(60.0)
    process.close()
    assert said.startswith('ended with exit code 1: "msgspec.DecodeError: MessagePack data is malformed')


async def test_a_closed_channel_leaves_no_process() -> None:
    async with opened(GLOO) as (server, client):
        await carry(server, client)
        mine = processes_of(GLOO)
        assert len(mine) == 2
    assert not set(mine) & set(processes_of(GLOO))


async def test_a_stopped_process_of_gloo_does_not_delay_closing() -> None:
    async with opened(GLOO) as (server, client):
        await carry(server, client)
        for pid in processes_of(GLOO):
            os.kill(pid, signal.SIGSTOP)
        with anyio.fail_after(5):
            await client.aclose()
            await server.aclose()
    assert not processes_of(GLOO)


async def test_a_spawner_that_ended_is_replaced(no_leaked_descriptors: None) -> None:
    transport = GlooTransport()
    async with opened(transport) as (server, client):
        await carry(server, client)
        running = transport._spawner._running
        assert running is not None
        first = running.end.peek()
        assert first is not None
        os.kill(first[2][0].pid, signal.SIGKILL)
        with pytest.raises(TransportError, match="could not be started, or was ended with its spawner"):
            await client.recv(empty())
    async with opened(transport) as (server, client):
        await carry(server, client)
    assert transport._spawner._running is not running


def test_without_a_python_to_start_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "")
    with pytest.raises(TransportError, match=r"sys\.executable"):
        Spawner().start()
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(TransportError, match=r"can't be started.*/nowhere/python"):
        Spawner().start()
    monkeypatch.setattr("sys.executable", "/bin/false")
    try:
        process = Spawner().start()
    except TransportError as error:  # it has ended before it could be asked for anything
        said = error.message.replace("can't be", "could not be")
    else:
        said = process.obituary(60)
        process.close()
    assert "could not be started" in said
