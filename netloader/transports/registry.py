"""Transports by name, from the entry-point group ``netloader.transports``. They are imported on first use."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from netloader.errors import TORCH_HINT, TransportUnavailable
from netloader.transports.base import Transport
from netloader.transports.contract_0_1 import adapted

__all__ = ["AUTO", "GROUP", "Available", "available", "known", "load", "preferred", "wanted"]

GROUP = "netloader.transports"
AUTO = "auto"

_OURS = {
    "gloo": "netloader.transports.gloo:GlooTransport",
    "hccl": "netloader.transports.hccl:HcclTransport",
    "memory": "netloader.transports.memory:MemoryTransport",
    "shm": "netloader.transports.shm:ShmTransport",
    "tcp": "netloader.transports.tcp:TcpTransport",
}
"""The transports of this package. They are also known where it is not installed (a source tree on the path)."""

_EXTRAS = {"gloo": "torch"}
"""Which extra of this package installs what a transport of this package imports."""

_PREFERENCE = ("shm", "tcp", "hccl")
"""The transports of ``auto``, best first. All others are used only when they are named: `gloo`, which does what `tcp`
does but slower and with helper processes, `memory`, and transports of other packages."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Available:
    """The transports that can run here.

    Attributes:
        transports: In order of preference; at least one.
        reasons: By name, why each other transport that was considered can't run.
    """

    transports: tuple[Transport, ...]
    reasons: dict[str, str] = field(default_factory=dict)


@lru_cache(maxsize=1)
def _entries() -> dict[str, EntryPoint]:
    found = {name: EntryPoint(name=name, value=value, group=GROUP) for name, value in _OURS.items()}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        taken = found.get(entry.name)
        if taken is None:
            found[entry.name] = entry
        elif taken.value != entry.value:
            _log.warning("transport %r is %s; ignoring %s of the same name", entry.name, taken.value, entry.value)
    return found


def known() -> tuple[str, ...]:
    """Names of all registered transports, whether or not they can be loaded."""
    return tuple(sorted(_entries()))


def preferred(device: str) -> tuple[str, ...]:
    """The names that ``auto`` stands for with tensors on `device`, best first, registered or not."""
    kind = device.partition(":")[0]
    if kind == "npu":  # a transport that moves device memory directly comes before those that copy through the host
        return ("hccl", *(name for name in _PREFERENCE if name != "hccl"))
    return tuple(name for name in _PREFERENCE if name != "hccl")


@lru_cache(maxsize=64)
def load(name: str) -> Transport:
    """The transport of that name; the same object each time.

    Raises:
        TransportUnavailable: There is none of that name, it needs something that is not installed, or the object
            registered under the name is not a transport.
    """
    entry = _entries().get(name)
    if entry is None:
        raise TransportUnavailable(
            f"there is no transport {name!r}", hint=f"known here: {', '.join(known())}; others come as plugins"
        )
    try:
        made = entry.load()
    except ImportError as error:
        raise TransportUnavailable(
            f"transport {name!r} is known but can't be loaded: {error}", hint=_remedy(entry)
        ) from error
    except AttributeError as error:
        raise TransportUnavailable(
            f"transport {name!r} is registered as {entry.value}, which does not exist: {error}"
        ) from error
    transport = made() if isinstance(made, type) else made
    if not isinstance(transport, Transport) or transport.name != name:
        raise TransportUnavailable(
            f"{entry.value} is registered as transport {name!r} but is not one: {type(transport).__name__}",
            hint="it needs the methods of netloader.transports.base.Transport and the name it is registered under",
        )
    return adapted(transport)


def available(device: str, wanted: str | Sequence[str] = AUTO) -> Available:
    """The transports that can move tensors on `device`.

    Args:
        device: As torch names it (``cpu``, ``npu:3``).
        wanted: ``auto``, one name, or names in order of preference (``auto`` may be among them).

    Raises:
        TransportUnavailable: A name is unknown, or none of the wanted transports can run here. It says why for each.
    """
    asked = [wanted] if isinstance(wanted, str) else list(wanted)
    names: list[str] = []
    for name in asked:
        # The names that auto stands for need not be registered; names that the user gives have to be.
        names += [one for one in preferred(device) if one in _entries()] if name == AUTO else [name]
    unknown = [name for name in names if name not in _entries()]
    if unknown:
        raise TransportUnavailable(
            f"there is no transport {', '.join(map(repr, unknown))}",
            hint=f"known here: {', '.join((AUTO, *known()))}; others come as plugins",
        )
    transports: list[Transport] = []
    reasons: dict[str, str] = {}
    for name in dict.fromkeys(names):
        try:
            transport = load(name)
        except TransportUnavailable as error:
            reasons[name] = str(error)
            continue
        reason = transport.missing(device)
        if reason is None:
            transports.append(transport)
        else:
            reasons[name] = reason
    if not transports:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "none was asked for"
        raise TransportUnavailable(f"no transport can run here for tensors on {device}: {why}")
    return Available(tuple(transports), reasons)


def _remedy(entry: EntryPoint) -> str:
    extra = _EXTRAS.get(entry.name)
    if extra is not None and entry.value == _OURS.get(entry.name):
        return TORCH_HINT if extra == "torch" else f"pip install 'netloader[{extra}]'"
    package = entry.dist.name if entry.dist is not None else entry.module
    return f"install what {package} needs"


def wanted(device: str, items: str | Transport | Sequence[str | Transport]) -> Available:
    """The wanted transports that can run on `device`, and the reasons why others cannot.

    Objects are used as they are; names are looked up in the registry.

    Raises:
        TransportUnavailable: A name is unknown, or none of the wanted transports can run here.
    """
    found: list[Transport] = []
    reasons: dict[str, str] = {}
    for item in [items] if isinstance(items, str | Transport) else items:
        if isinstance(item, str):
            known_ones = available(device, item)
            found.extend(known_ones.transports)
            reasons |= known_ones.reasons
        else:
            found.append(adapted(item))
    return Available(tuple(found), reasons)
