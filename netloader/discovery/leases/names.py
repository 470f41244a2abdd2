"""Names and values in a registry: where servers and claims are written, and what marks a server as withdrawn. No I/O.

A server is ``<prefix>/servers/<key>/<role>/<rank>/<address>``: a client reads the servers of one rank only, and a
server that restarts at its address replaces its own entry. A claim is ``<prefix>/claims/<work>/lock``; how far its
holder is stands beside it, so that the value of the lock never changes.
"""

from __future__ import annotations

import hashlib
import re

import msgspec

from netloader.core.addresses import parse_address
from netloader.core.entries import Entry
from netloader.discovery.base import Holder, Wanted
from netloader.errors import ConfigError, legible

__all__ = [
    "WITHDRAWN",
    "Lock",
    "Progress",
    "check_prefix",
    "claim_prefix",
    "lock_name",
    "progress_name",
    "read_lock",
    "read_progress",
    "server_name",
    "servers_prefix",
]

WITHDRAWN = b"withdrawn"
"""In place of the entry of a server that has withdrawn: it will not come back, unlike one that is missing."""

LONGEST_LABEL = 200
LONGEST_PROGRESS = 500

_INVALID = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding raises on what anyone may have written."""

_PART = re.compile(r"[A-Za-z0-9_.-]{1,80}")
_PREFIX = re.compile(r"[A-Za-z0-9_.-]{1,80}(/[A-Za-z0-9_.-]{1,80}){0,2}")


class Lock(msgspec.Struct, frozen=True):
    """The value of a lock.

    Attributes:
        token: Random: two attempts to get one lock never write the same value.
        holder: Who holds it, for people.
    """

    token: str
    holder: str


class Progress(msgspec.Struct, frozen=True):
    """What the holder of a lock tells.

    Attributes:
        token: That of the lock. Nothing is believed of another one.
        text: How far it is, for people.
        released: Whether the holder gave the lock back. A lock that is missing without this has expired, or the
            registry lost it.
    """

    token: str
    text: str
    released: bool = False


def check_prefix(prefix: str) -> str:
    """`prefix`, if the names of a store may begin with it.

    Raises:
        ConfigError: They may not.
    """
    if not _PREFIX.fullmatch(prefix):
        raise ConfigError(
            field="prefix", value=prefix, allowed="one to three parts of letters, digits, '-', '_' and '.', split by /"
        )
    return prefix


def servers_prefix(prefix: str, wanted: Wanted) -> str:
    """The beginning of the names of all servers that are wanted."""
    return f"{prefix}/servers/{_part(wanted.key)}/{_part(wanted.role)}/{wanted.rank}/"


def server_name(prefix: str, entry: Entry) -> str:
    """The name of one server.

    Raises:
        ConfigError: Its address is no address.
    """
    address = parse_address(entry.address, field="address of the entry")
    # Without brackets, which are wildcards in some registries. The port stands after the last colon.
    return servers_prefix(prefix, Wanted(entry.key, entry.rank, entry.role)) + f"{address.host}:{address.port}"


def claim_prefix(prefix: str, work: str) -> str:
    """The beginning of all names of one claim."""
    return f"{prefix}/claims/{_part(work)}/"


def lock_name(prefix: str, work: str) -> str:
    """Who holds a claim."""
    return claim_prefix(prefix, work) + "lock"


def progress_name(prefix: str, work: str) -> str:
    """How far the holder is."""
    return claim_prefix(prefix, work) + "progress"


def read_lock(value: bytes) -> Lock:
    """A lock that anyone may have written: one that makes no sense is held all the same, by whoever wrote it."""
    try:
        lock = msgspec.json.decode(value, type=Lock)
    except _INVALID:
        return Lock(hashlib.sha256(value).hexdigest(), "somebody who is not known")
    return Lock(lock.token, legible(lock.holder, LONGEST_LABEL))


def read_progress(value: bytes, lock: Lock) -> Holder:
    """What the holder of `lock` tells; nothing if `value` was not written by it."""
    progress = _progress(value)
    if progress is None or progress.token != lock.token:
        return Holder(lock.holder)
    return Holder(lock.holder, legible(progress.text, LONGEST_PROGRESS))


def is_released(value: bytes, token: str) -> bool:
    """Whether the last holder that was seen gave its lock back."""
    progress = _progress(value)
    return progress is not None and progress.released and progress.token == token


def _progress(value: bytes) -> Progress | None:
    try:
        return msgspec.json.decode(value, type=Progress)
    except _INVALID:
        return None


def _part(text: str) -> str:
    """One part of a name: `text` itself if it is short and plain, otherwise its digest."""
    return text if _PART.fullmatch(text) else f"sha256-{hashlib.sha256(text.encode()).hexdigest()}"
