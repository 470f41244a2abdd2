"""Values that anyone may write into a registry: short ones on which reading or calculating fails in its own way."""

from __future__ import annotations

import msgspec

from netloader.core.entries import Entry, encode_entry

__all__ = ["NESTED", "forged"]

NESTED = b"[" * 3000


def forged(entry: Entry) -> dict[str, bytes]:
    """Forms of `entry` by name, none of which is of any use."""
    begin = encode_entry(msgspec.structs.replace(entry, labels={}))[:-1]
    digits = b"9" * 400
    fields = {
        "nested": b'"x":' + NESTED,
        "nested and closed": b'"x":' + NESTED + b"]" * len(NESTED) + b"}",
        "nested labels": b'"labels":{"a":' + NESTED,
        "half a character": b'"labels":{"a":"\\ud800"}}',
        **{
            f"{name} {value[:6].decode()}": b'"load":{"' + name.encode() + b'":' + value + b"}}"
            for name in ("clients", "waiting", "cap", "bytes_per_second")
            for value in (digits, b"-1", b"1e999", b"NaN", b"1" + b"0" * 20)
        },
        **{f"rank {value[:6].decode()}": b'"rank":' + value + b"}" for value in (digits, b"-1")},
    }
    return {name: begin + b"," + text for name, text in fields.items()}
