"""The mappings of this process, from two interfaces of the kernel."""

from __future__ import annotations

import ctypes
import mmap
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloader.tensors import mappings
from netloader.tensors.mappings import HEAP, mapped, not_writable

PAGE = mmap.PAGESIZE


def address_of(mapping: mmap.mmap) -> int:
    """The address of a mapping, which may be read-only."""
    libc = ctypes.pythonapi
    view = ctypes.py_object(mapping)
    buffer = (ctypes.c_void_p * 10)()  # a Py_buffer: its first word is the address
    assert libc.PyObject_GetBuffer(view, ctypes.byref(buffer), 0) == 0
    libc.PyBuffer_Release(ctypes.byref(buffer))
    return int(buffer[0] or 0)


def _takes_questions() -> bool:
    try:
        mappings._queried([PAGE], [PAGE + 1])
    except OSError:
        return False
    return True


asking = pytest.mark.skipif(not _takes_questions(), reason="the kernel answers such questions from 6.11 on")


@asking
@given(writable=st.lists(st.booleans(), min_size=1, max_size=12), data=st.data())
def test_both_methods_find_the_same_mappings(writable: list[bool], data: st.DataObject) -> None:
    both = mmap.PROT_READ | mmap.PROT_WRITE
    made = [mmap.mmap(-1, 4 * PAGE, prot=both if one else mmap.PROT_READ) for one in writable]
    places = sorted(zip(map(address_of, made), writable, strict=True))
    chosen = data.draw(st.lists(st.sampled_from(places), unique=True, min_size=1))
    starts = [start + PAGE + 8 for start, _ in sorted(chosen)]
    ends = [start + 16 for start in starts]
    asked, listed = mappings._queried(starts, ends), mapped(mappings._NOT_WRITABLE)
    assert asked is not None
    for start, end, (_, can_be_written) in zip(starts, ends, sorted(chosen), strict=True):
        for found in (asked, listed):
            assert any(low < end and high > start for low, high in found) == (not can_be_written)
    assert all(a[1] <= b[0] for a, b in pairwise(asked))
    assert set(asked) <= set(listed)
    assert not_writable(starts, ends) == asked


@asking
def test_a_range_over_several_mappings_is_seen_as_a_whole() -> None:
    mapping = mmap.mmap(-1, 6 * PAGE)
    start = address_of(mapping)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert libc.mprotect(start + 2 * PAGE, PAGE, mmap.PROT_READ) == 0
    try:
        locked = (start + 2 * PAGE, start + 3 * PAGE)
        assert locked in (mappings._queried([start], [start + 6 * PAGE]) or [])
        assert locked in not_writable([start + PAGE], [start + 2 * PAGE + 1])
        assert mappings._queried([start], [start + 2 * PAGE]) == []
        assert mappings._queried([start + 3 * PAGE], [start + 6 * PAGE]) == []
    finally:
        libc.mprotect(start, 6 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE)


@asking
def test_unmapped_addresses_have_no_mapping() -> None:
    assert not_writable([], []) == []
    assert not_writable([1 << 63], [(1 << 63) + 1]) == []


def test_without_the_kernel_query_the_list_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mappings, "_QUERY_IOCTL", 0)
    start = address_of(mmap.mmap(-1, PAGE, prot=mmap.PROT_READ))
    with pytest.raises(OSError):
        mappings._queried([start], [start + 1])
    assert not_writable([start], [start + 1]) == mapped(mappings._NOT_WRITABLE)


def test_with_too_many_mappings_the_list_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mappings, "_MAX_QUERIES", 2)
    kept = [mmap.mmap(-1, PAGE, prot=mmap.PROT_READ if odd else 3) for odd in (0, 1, 0, 1)]
    starts = sorted(map(address_of, kept))
    assert not_writable(starts, [start + 1 for start in starts]) == mapped(mappings._NOT_WRITABLE)


def test_without_the_list_the_mappings_are_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mappings, "_MAPS", tmp_path / "none")
    assert not_writable([1], [2]) == []
    assert mapped(HEAP) == []
