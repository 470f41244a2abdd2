"""Which of many equal sources a client prefers: the nearest, then the least busy, then its own share of them. Pure.

Clients that start together see the same sources with the same load. Rendezvous hashing spreads them: each client ranks
the sources by a hash over both names. When a source goes, only its own clients move, each to the next of its ranking.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "BOOT",
    "HOST",
    "NAME",
    "ZONE",
    "Here",
    "Preference",
    "busy_class",
    "distance",
    "other_name",
    "preference",
]

HOST = "host"
"""Label: the name of the host, for people."""

BOOT = "boot"
"""Label: a digest that all processes of one running kernel share, also those in containers, and nobody else."""

ZONE = "zone"
"""Label: the zone of the host, as the user names it."""

NAME = "name"
"""Label: the name of the model."""

_HASH_BYTES = 8

_ROOM = 0.5
"""A server with less than this load counts as idle."""

_MOST_BUSY = 64


@dataclass(frozen=True, slots=True)
class Here:
    """Where a client runs, and what it looks for.

    Attributes:
        client: Names the client, so that clients choose differently. It should be random.
        host: Name of the host.
        boot: As the label :data:`BOOT`; empty when it is not known.
        zone: Its zone; empty when it has none.
        name: Name of the model; empty when it has none.
    """

    client: str = ""
    host: str = ""
    boot: str = ""
    zone: str = ""
    name: str = ""


class Preference(NamedTuple):
    """How much a source is preferred: the least comes first.

    Attributes:
        other_name: Whether it states another name for the model. It may be another model, which validation finds out.
        distance: 0 on the same host, 1 in the same zone, 2 elsewhere.
        busy: The class of its load.
        share: The place that the client's hash gives it.
    """

    other_name: bool
    distance: int
    busy: int
    share: int


def preference(here: Here, source: str, labels: Mapping[str, str], load: float) -> Preference:
    """How much a client prefers a source.

    Args:
        here: The client.
        source: Names the source, the same for all clients.
        labels: Its labels.
        load: Clients in relation to what it serves at once.
    """
    return Preference(
        other_name(here, labels),
        distance(here, labels),
        busy_class(load),
        _hash(here.client, source),
    )


def other_name(here: Here, labels: Mapping[str, str]) -> bool:
    """Whether a source states another name for the model than the client does."""
    name = labels.get(NAME, "")
    return bool(name and here.name and name != here.name)


def distance(here: Here, labels: Mapping[str, str]) -> int:
    """0 on the same host, 1 in the same zone, 2 elsewhere or where it is not known.

    The name of the host counts only where one of the two sides does not know its kernel: hosts may have equal names.
    """
    boot, host, zone = (labels.get(label, "") for label in (BOOT, HOST, ZONE))
    if (boot == here.boot) if boot and here.boot else (host == here.host != ""):
        return 0
    return 1 if zone == here.zone != "" else 2


def busy_class(load: float) -> int:
    """The class of a load: 0 below half, 1 while there is room, then one more for each doubling.

    Published loads are seconds old, and many clients read the same ones. If the least difference decided, all of them
    would go to one source.
    """
    if load < _ROOM:
        return 0
    found, limit = 1, 1.0
    while load >= limit and found < _MOST_BUSY:
        found, limit = found + 1, limit * 2
    return found


def _hash(client: str, source: str) -> int:
    """The place of a source in a client's ranking."""
    names = (name.encode(errors="surrogatepass") for name in (client, source))
    text = b"".join(len(name).to_bytes(4, "big") + name for name in names)
    return int.from_bytes(hashlib.blake2b(text, digest_size=_HASH_BYTES).digest(), "big")
