"""The bytes of a client's first message, made harmless for servers of other programs.

vllm-ascend has a loader of the same name. Its server reads the first bytes of a connection, at most 1024, as UTF-8, and
the thread that accepts connections ends for good when they are not (vllm-ascend 0.23.0). MessagePack is not UTF-8. So
the first message begins with text that nobody asked for: both protocols ignore fields that they do not know.
"""

from __future__ import annotations

import itertools

__all__ = ["READ_AT_MOST", "harmless"]

READ_AT_MOST = 1024
"""Bytes that such a server reads of a connection."""

_TEXT = (
    "This is a client of the Python package netloader, which speaks another protocol than the loader netloader of "
    "vllm-ascend. These texts keep its first bytes harmless. "
)
_LONGEST, _SHORTEST = 191, 128
_STRINGS = 8
"""Keys and values. The first READ_AT_MOST bytes end within one of them."""

_MAP, _STRING = 0x80, 0xD9
"""First bytes, in MessagePack, of a map with less than 16 fields (plus their number), and of a string whose length is
in the next byte. A length of 128 to 191 together with _STRING is one character of UTF-8."""

_MOST_FIELDS = 15
_LEAD = 0xC2
"""First byte of two in UTF-8: the last byte of the frame's length, in front of the byte of the map."""

_MOST_BYTES = 0x7000
"""A longer message is left as it is, because its length itself could not be read as text."""


def harmless(body: bytes) -> bytes:
    """The body of a first message, so that the first bytes of its frame are valid UTF-8.

    Args:
        body: The message in MessagePack.

    Returns:
        The same map, with fields in front that every release ignores. `body` itself if it is larger than any real
        first message.
    """
    fields = body[0] - _MAP + _STRINGS // 2
    if not _MAP <= body[0] < _MAP + 16 or fields > _MOST_FIELDS or len(body) > _MOST_BYTES:
        return body
    excess = (len(body) + _STRINGS * (2 + _LONGEST) - _LEAD) % 256
    lengths = [_LONGEST] * _STRINGS
    for place in reversed(range(_STRINGS)):  # the last ones: the first have to reach as far as such a server reads
        cut = min(excess, _LONGEST - _SHORTEST)
        lengths[place], excess = _LONGEST - cut, excess - cut
    text = itertools.cycle(_TEXT.encode())
    padding = (bytes((_STRING, length, *itertools.islice(text, length))) for length in lengths)
    return bytes((_MAP + fields,)) + b"".join(padding) + body[1:]
