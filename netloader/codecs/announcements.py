"""Decodes a long announcement in parts, because a call into C blocks all other threads until it returns.

A part is a few thousand tensors or half a MiB. A scanner written in Python finds where each part ends: unlike one call
that skips a whole frame, it lets other threads run. What a peer wrote into a frame is limited before it is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import repeat

import msgspec

from netloader.core.manifest import (
    DIGEST_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_TENSORS,
    TENSORS_AT_ONCE,
    Manifest,
    TensorSpec,
    array_header,
    check_sizes,
)
from netloader.core.messages import MAX_METADATA, Announce
from netloader.core.plan import MAX_BLOCKS
from netloader.errors import ManifestError, RemoteProtocolError

__all__ = ["OTHER_BYTES", "PREFIX_BYTES", "begins_an_announcement", "decode_in_parts"]

OTHER_BYTES = DIGEST_BYTES * MAX_BLOCKS + (1 << 20)
"""Most bytes of an announcement besides its tensors: the digests of the most blocks and short fields. Metadata fits
too: only a model of more than 800,000 blocks has no room for the most metadata."""

_PART_BYTES = 512 << 10
"""Most bytes of tensors that are decoded by one call."""

_TENSOR_ELEMENTS = 256
"""Most MessagePack elements of one tensor: shape and stride have up to 64 each."""

_FIELD_ELEMENTS = 4 * MAX_METADATA
"""Most MessagePack elements of any other field. Metadata has the most."""

_FIELDS = 64
"""Most fields of an announcement. Later releases may add some."""

_TYPE = b"\xa4type\xa8Announce"
_MAP_HEADER = 5
PREFIX_BYTES = _MAP_HEADER + len(_TYPE)
"""Bytes of a body that show what message it is."""

_NIL = 0xC0
_MAP_16, _MAP_32, _ARRAY_16 = 0xDE, 0xDF, 0xDC
_MANIFEST_KEY = b"\xa8manifest"

_TENSORS = msgspec.msgpack.Decoder(list[TensorSpec])


def _short_forms() -> tuple[list[int], list[int]]:
    """For each first byte: bytes of the element (0 if a length follows), and how many elements it adds, less itself."""
    size, more = [1] * 256, [-1] * 256
    for low in range(16):
        more[0x80 | low], more[0x90 | low] = 2 * low - 1, low - 1
    for low in range(32):
        size[0xA0 | low] = 1 + low
    # float 32 and 64; uint and int of 8, 16, 32 and 64 bits; fixext of 1, 2, 4, 8 and 16 bytes
    for first, widths in ((0xCA, (4, 8)), (0xCC, (1, 2, 4, 8, 1, 2, 4, 8)), (0xD4, (2, 3, 5, 9, 17))):
        for kind, width in enumerate(widths, first):
            size[kind] = 1 + width
    for kind in _LONG:
        size[kind] = 0
    return size, more


_LONG = {
    # first byte: bytes of the length, bytes after it besides the content, elements for each unit of length
    0xC4: (1, 0, 0), 0xC5: (2, 0, 0), 0xC6: (4, 0, 0),  # bin
    0xC7: (1, 1, 0), 0xC8: (2, 1, 0), 0xC9: (4, 1, 0),  # ext
    0xD9: (1, 0, 0), 0xDA: (2, 0, 0), 0xDB: (4, 0, 0),  # str
    _ARRAY_16: (2, 0, 1), 0xDD: (4, 0, 1),
    _MAP_16: (2, 0, 2), _MAP_32: (4, 0, 2),
}  # fmt: skip
_SIZE, _MORE = _short_forms()


def _end_of(data: bytes | memoryview, at: int, most: int) -> int | None:
    """Where the value that begins at `at` ends.

    Returns:
        None if `data` ends before it, or if it has more than `most` elements.
    """
    left, end = 1, len(data)
    for _ in repeat(None, most):
        if at >= end:
            return None
        kind = data[at]
        size = _SIZE[kind]
        if size:
            at += size
            left += _MORE[kind]
        else:
            digits, other, each = _LONG[kind]
            past = at + 1 + digits
            length = int.from_bytes(data[at + 1 : past], "big")
            at = past + other + (0 if each else length)
            left += each * length - 1
        if not left:
            return at if at <= end else None
    return None


def _container(view: memoryview, at: int, fixed: int, long: int) -> tuple[int, int] | None:
    """Length of the array or map that begins at `at`, and where its first element is; None if there is none.

    Args:
        view: The data.
        at: Where.
        fixed: First byte of the short form with length 0.
        long: First byte of the form with 16 bits of length; the one with 32 bits follows it.
    """
    kind = view[at] if at < len(view) else _NIL
    if kind & 0xF0 == fixed:
        return kind & 0x0F, at + 1
    if kind not in (long, long + 1):
        return None
    past = at + (3 if kind == long else 5)
    return int.from_bytes(view[at + 1 : past], "big"), past


def begins_an_announcement(prefix: memoryview) -> bool:
    """Whether a body that begins with these :data:`PREFIX_BYTES` bytes is one: a message's type is its first field."""
    fields = _container(prefix, 0, 0x80, _MAP_16)
    return fields is not None and bytes(prefix[fields[1] :]).startswith(_TYPE)


def decode_in_parts(body: bytes | memoryview, decode: Callable[[bytes], Announce]) -> Generator[None, None, Announce]:
    """Decode the body of an announcement.

    Args:
        body: The body.
        decode: Decodes an announcement without a manifest.

    Yields:
        After each part. The caller may stop there.

    Returns:
        The announcement.

    Raises:
        RemoteProtocolError: The announcement breaks a limit.
        msgspec.MsgspecError: It is no valid message.
    """
    view = memoryview(body)
    fields = _container(view, 0, 0x80, _MAP_16)
    if fields is None or fields[0] > _FIELDS:
        raise _refused(f"the peer announced with no map of at most {_FIELDS} fields")
    count, at = fields
    others: list[memoryview] = []
    specs: list[TensorSpec] | None = None
    for _ in range(count):
        value = _past(view, at, _FIELD_ELEMENTS)
        if view[at:value] == _MANIFEST_KEY and view[value : value + 1] != bytes((_NIL,)):
            if specs is not None:
                raise _refused("the peer announced two manifests in one message")
            specs = []
            try:
                at = yield from _tensors(view, value, specs)
            except Exception:
                while specs:  # in parts, because freeing is one call into C too
                    del specs[-TENSORS_AT_ONCE:]
                raise
            continue
        end = _past(view, value, _FIELD_ELEMENTS)
        others.append(view[at:end])
        at = end
        if sum(map(len, others)) > OTHER_BYTES:
            raise _refused(f"the peer announced more than {OTHER_BYTES} bytes besides its tensors")
        yield
    if at != len(view):
        raise msgspec.DecodeError(f"{len(view) - at} bytes follow the message")
    message = decode(b"".join((bytes((_MAP_16, 0, len(others))), *others)))
    return message if specs is None else msgspec.structs.replace(message, manifest=Manifest(tuple(specs)))


def _refused(text: str) -> RemoteProtocolError:
    return RemoteProtocolError(text, hint="no model needs that: pull from another source")


def _past(view: memoryview, at: int, most: int) -> int:
    end = _end_of(view, at, most)
    if end is None:
        raise _refused(f"the peer announced a field that is cut, or has more than {most} elements")
    return end


def _tensors(view: memoryview, at: int, specs: list[TensorSpec]) -> Generator[None, None, int]:
    """Decode the manifest that begins at `at` into `specs`. Returns where it ends."""
    fields = _container(view, at, 0x90, _ARRAY_16)
    tensors = _container(view, fields[1], 0x90, _ARRAY_16) if fields is not None and fields[0] else None
    if fields is None or tensors is None:
        raise _refused("the peer announced a manifest that is no list of tensors")
    left, at = tensors
    if left > MAX_TENSORS:
        raise _refused(f"the peer announced {left} tensors, allowed are <= {MAX_TENSORS}")
    sizes, latest = 0, at + MAX_MANIFEST_BYTES
    while left:
        window = bytes(view[at : at + _PART_BYTES])
        count = past = 0
        while count < min(left, TENSORS_AT_ONCE):
            end = _end_of(window, past, _TENSOR_ELEMENTS)
            if end is None:
                break
            count, past = count + 1, end
        if not count:
            raise _refused(f"the peer announced a tensor that is cut, or has more than {_TENSOR_ELEMENTS} elements")
        specs += (more := _TENSORS.decode(array_header(count) + window[:past]))
        left, at = left - count, at + past
        try:
            sizes = check_sizes(more, sizes)
        except ManifestError as error:
            raise _refused(error.message) from None
        if at > latest:
            raise _refused(f"the peer announced tensors of more than {MAX_MANIFEST_BYTES} bytes")
        yield
    for _ in range(fields[0] - 1):  # fields that a later release added
        at = _past(view, at, _FIELD_ELEMENTS)
    return at
