"""Regions of memory by address, and the system calls that use them."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import threading
import time
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloader.codecs.regions import Regions, left_of, objects, regions_over, total
from netloader.core.plan import make_plan
from netloader.tensors import describe
from netloader.transports.io.stream import calls
from netloader.transports.io.syscalls import MOST_REGIONS, Message, readv, recvmsg, sendmsg, vmsplice
from tests.tensor_sets import Sketch, build, sketches
from tests.transports.bytesview import BytesView

sizes = st.lists(st.integers(0, 40), max_size=30)


def block(data: bytes, cuts: list[int]) -> BytesView:
    """`data` in spans of these sizes."""
    starts = [sum(cuts[:place]) for place in range(len(cuts))]
    return BytesView(0, *(data[start : start + size] for start, size in zip(starts, cuts, strict=True)))


def bytes_at(regions: Regions[int]) -> bytes:
    return b"".join(bytes(piece) for piece in objects(regions))


@given(cuts=sizes)
def test_the_regions_of_a_block_are_its_bytes(cuts: list[int]) -> None:
    whole = block(os.urandom(sum(cuts)), cuts)
    regions = whole.regions()
    assert (regions.typecode, regions.itemsize) == ("Q", 8)
    assert 0 not in regions[1::2]
    assert total(regions) == whole.nbytes
    assert bytes_at(regions) == whole.data


@given(sketch=sketches(), block_bytes=st.sampled_from([1024, 4096, 1 << 20]))
def test_regions_and_byte_views_of_tensor_blocks_are_the_same_bytes(sketch: list[Sketch], block_bytes: int) -> None:
    tensors = build(sketch, seed=1)
    manifest, memory = describe(tensors)
    plan = make_plan(manifest, block_bytes)
    for view in memory.views(plan, range(len(plan.blocks))):
        assert bytes_at(view.regions()) == b"".join(view.buffers())
        assert total(view.regions()) == view.nbytes


@given(cuts=sizes, data=st.data())
def test_completed_bytes_are_removed_from_the_regions(cuts: list[int], data: st.DataObject) -> None:
    whole = block(os.urandom(sum(cuts)), cuts)
    done = data.draw(st.integers(0, whole.nbytes))
    regions = whole.regions()
    kept = regions[:]
    assert bytes_at(left_of(regions, done)) == whole.data[done:]
    assert regions == kept, "what was given stays as it was"
    assert not left_of(regions, whole.nbytes)


@given(
    cuts=st.lists(sizes, max_size=8), least=st.sampled_from([1, 30, 100]), longest=st.sampled_from([100, 130, 10_000])
)
def test_calls_cover_every_byte_in_order_and_mark_block_ends(cuts: list[list[int]], least: int, longest: int) -> None:
    blocks = [block(os.urandom(sum(one)), one) for one in cuts]
    moved, ended, ends = b"", list[int](), list[int]()
    for regions, places in calls(list(enumerate(blocks)), least, longest):
        assert total(regions) <= longest
        assert len(regions) <= 2 * MOST_REGIONS
        moved += bytes_at(regions)
        ended += places
        ends += [len(moved)] * len(places)
        assert sum(blocks[place].nbytes for place in places[1:-1]) < least, "none is added to what is enough"
    assert moved == b"".join(one.data for one in blocks)
    assert ended == list(range(len(blocks)))
    for place, end in enumerate(ends):
        assert end >= sum(one.nbytes for one in blocks[: place + 1]), "said only once its bytes are through"


@given(cuts=st.lists(st.integers(1, 2000), min_size=1, max_size=40), data=st.data())
def test_what_is_sent_by_address_arrives(cuts: list[int], data: st.DataObject) -> None:
    sent = block(os.urandom(sum(cuts)), cuts)
    split = data.draw(st.integers(1, sent.nbytes))
    received = block(bytes(sent.nbytes), [part for part in (split, sent.nbytes - split) if part])
    left, right = socket.socketpair()
    with left, right:
        assert sendmsg(left.fileno(), Message(sent.regions())) == sent.nbytes
        assert recvmsg(right.fileno(), Message(received.regions()), socket.MSG_WAITALL) == sent.nbytes
        left.shutdown(socket.SHUT_WR)
        assert recvmsg(right.fileno(), Message(received.regions())) == 0
    assert received.data == sent.data


@given(cuts=st.lists(st.integers(1, 2000), min_size=1, max_size=40), data=st.data())
def test_pages_from_a_pipe_are_received_by_address(cuts: list[int], data: st.DataObject) -> None:
    written = block(os.urandom(sum(cuts)), cuts)
    split = data.draw(st.integers(1, written.nbytes))
    read = block(bytes(written.nbytes), [part for part in (split, written.nbytes - split) if part])
    out, into = os.pipe()
    try:
        fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, 1 << 20)
        assert vmsplice(into, written.regions()) == written.nbytes
        assert readv(out, read.regions()) == written.nbytes
    finally:
        os.close(out)
        os.close(into)
    assert read.data == written.data


def test_a_call_takes_at_most_the_systems_limit_of_regions() -> None:
    data = BytesView(0, *[b"x"] * (MOST_REGIONS + 1))
    left, right = socket.socketpair()
    with left, right:
        regions = data.regions()
        assert sendmsg(left.fileno(), Message(regions[:-2])) == MOST_REGIONS
        with pytest.raises(OSError) as caught:
            sendmsg(left.fileno(), Message(regions))
    assert caught.value.errno == errno.EMSGSIZE


def test_system_errors_are_raised_as_os_errors() -> None:
    into = BytesView(0, bytes(10))
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        with pytest.raises(BlockingIOError):
            recvmsg(left.fileno(), Message(into.regions()))
        right.send(b"0123456789")
        with pytest.raises(OSError) as caught:
            recvmsg(left.fileno(), Message(regions_over([8], [10])))
        assert caught.value.errno == errno.EFAULT
    with pytest.raises(OSError) as caught:
        readv(-1, into.regions())
    assert caught.value.errno == errno.EBADF


def test_a_signal_does_not_end_a_call() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    main = threading.get_ident()
    left, right = socket.socketpair()

    def disturb() -> None:
        for _ in range(3):
            time.sleep(0.02)
            signal.pthread_kill(main, signal.SIGUSR1)
        left.send(b"0123456789")

    helper = threading.Thread(target=disturb, name="netloader-test")
    try:
        with left, right:
            helper.start()
            into = BytesView(0, bytes(10))
            assert recvmsg(right.fileno(), Message(into.regions()), socket.MSG_WAITALL) == 10
            helper.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert into.data == b"0123456789"
    assert heard


def test_region_objects_do_not_keep_memory_alive() -> None:
    data = bytearray(b"0123456789")
    (piece,) = objects(BytesView(0, data).regions())
    data += b"x" * 5  # a byte view of it would forbid that
    assert len(piece) == 10
    assert list(objects(array("Q"))) == []
