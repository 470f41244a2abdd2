"""What a server publishes about itself, so that clients find it. No secrets, and nothing that weights depend on.

A client takes each word of an entry for a hint: the server that it finds is validated like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from netloader.core.addresses import parse_address
from netloader.core.sources import Source
from netloader.errors import ConfigError, DiscoveryError

__all__ = ["MAX_ENTRY_BYTES", "Entry", "Load", "decode_entry", "encode_entry"]

MAX_ENTRY_BYTES = 8192
"""Most bytes of an encoded entry: a registry is shared, and a client reads thousands of entries."""


_Count = Annotated[int, msgspec.Meta(ge=0, le=999_999_999)]
"""What anyone may have written is bounded when it is read, so that calculating with it raises nothing."""

_Rate = Annotated[float, msgspec.Meta(ge=0.0, le=1e18)]


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """How busy a server is. Numbers that are read are from 0 to 999,999,999; bytes per second to 10^18.

    Attributes:
        clients: Clients that it serves now.
        waiting: Clients that wait for a turn.
        bytes_per_second: What it sends now.
        cap: Most clients that it serves at once.
    """

    clients: _Count = 0
    waiting: _Count = 0
    bytes_per_second: _Rate = 0.0
    cap: _Count = 1

    @property
    def share(self) -> float:
        """Clients and waiting ones in relation to the cap: below 1 there is room. The load of a `Source`."""
        return (self.clients + self.waiting) / max(1, self.cap)


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """One published server.

    Attributes:
        key: Digest over the fields of the identity that must be equal and are known before loading.
        address: ``host:port`` at which clients reach it.
        generation: A random text that a server chooses when it starts to publish. Another generation at the same
            address is another server.
        kind: A seed holds everything; a relay still receives what it passes on.
        rank: Of the engine that it serves.
        role: ``target`` or ``draft``.
        layout: ``raw``, ``processed`` or ``checkpoint``.
        root: Root digest of the weights in hex, empty where it is not known yet.
        labels: For choosing and for people: ``host``, ``zone``, ``name`` and others.
        load: How busy it is.
    """

    key: str
    address: str
    generation: str
    kind: Literal["seed", "relay"] = "seed"
    rank: _Count = 0
    role: str = "target"
    layout: str = "raw"
    root: str = ""
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)
    load: Load = Load()

    def source(self) -> Source:
        """The source that a pull is given. Its labels are those of the entry, and ``kind``, ``layout`` and ``root``.

        Raises:
            DiscoveryError: `address` is no address.
        """
        try:
            address = parse_address(self.address)
        except ConfigError as error:
            raise DiscoveryError(f"an entry names the address {self.address!r}: {error}", hint=_HINT) from error
        labels = {**self.labels, "kind": self.kind, "layout": self.layout, "root": self.root}
        return Source(address, labels=labels, load=self.load.share, generation=self.generation)


_HINT = "remove that entry from the registry; it was not written by netloader"


def encode_entry(entry: Entry) -> bytes:
    """An entry as JSON.

    Raises:
        DiscoveryError: It is longer than :data:`MAX_ENTRY_BYTES`.
    """
    encoded = msgspec.json.encode(entry)
    if len(encoded) > MAX_ENTRY_BYTES:
        raise DiscoveryError(
            f"the entry of {entry.address} has {len(encoded)} bytes, {MAX_ENTRY_BYTES} are allowed",
            hint="use fewer or shorter labels",
        )
    return encoded


def decode_entry(encoded: bytes) -> Entry:
    """Read an entry that anyone may have written. Fields that are not known are ignored.

    Raises:
        DiscoveryError: It is too long, or no entry.
    """
    if len(encoded) > MAX_ENTRY_BYTES:
        raise DiscoveryError(f"an entry has {len(encoded)} bytes, {MAX_ENTRY_BYTES} are allowed", hint=_HINT)
    try:
        return msgspec.json.decode(encoded, type=Entry)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DiscoveryError(f"an entry can't be read: {error}", hint=_HINT) from error
