"""Backends by URL: the scheme names an entry point of the group ``netloader.discovery``, imported on first use."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from netloader.core.urls import secrets_hidden, without_secrets
from netloader.discovery.base import Backend
from netloader.errors import ConfigError

__all__ = ["GROUP", "known", "open_backend", "without_secrets"]

GROUP = "netloader.discovery"

_OURS: dict[str, str] = {
    "dir": "netloader.discovery.folder:open_folder",
    "dns": "netloader.discovery.dns_records:open_dns",
    "dns+srv": "netloader.discovery.dns_records:open_dns",
}
"""The schemes of this package. They are also known where it is not installed (a source tree on the path)."""

_EXTRAS: dict[str, str] = {"dns": "dns", "dns+srv": "dns"}
"""By scheme, which extra of this package installs what it imports."""

_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):")
_log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def _entries() -> dict[str, EntryPoint]:
    found = {name: EntryPoint(name=name, value=value, group=GROUP) for name, value in _OURS.items()}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        taken = found.get(entry.name)
        if taken is None:
            found[entry.name] = entry
        elif taken.value != entry.value:
            _log.warning("discovery %r is %s; ignoring %s of the same name", entry.name, taken.value, entry.value)
    return found


def known() -> tuple[str, ...]:
    """All registered schemes, whether or not they can be loaded."""
    return tuple(sorted(_entries()))


def open_backend(url: str, *, field: str = "discovery") -> Backend:
    """The backend that a URL names. It does no I/O, but the first call for a scheme imports what it needs.

    On an event loop, call it in a thread.

    Args:
        url: ``scheme:...``. The scheme is the name of an entry point, whose object is called with the whole URL.
        field: Where the URL was found; errors name it.

    Raises:
        ConfigError: The scheme is not known, what it needs is not installed, or it does not accept the URL. No password
            is shown.
    """
    shown = without_secrets(url)
    found = _SCHEME.match(url)
    if found is None:
        raise ConfigError(field=field, value=shown, allowed=_allowed(), reason="it begins with no scheme")
    scheme = found["scheme"].lower()
    entry = _entries().get(scheme)
    if entry is None:
        raise ConfigError(field=field, value=shown, allowed=_allowed(), reason=f"there is no scheme {scheme!r}")
    try:
        make = entry.load()
    except ImportError as error:
        raise ConfigError(
            field=field,
            value=shown,
            allowed=_allowed(),
            reason=f"{scheme!r} is known but can't be loaded: {error}",
            hint=_remedy(entry),
        ) from error
    except AttributeError as error:
        reason = f"{scheme!r} is registered as {entry.value}, which does not exist: {error}"
        raise ConfigError(field=field, value=shown, allowed=_allowed(), reason=reason) from error
    try:
        backend = make(url)
    except ConfigError as error:
        what = error.reason or f"{error.field} is wrong"
        # Not `from error`: a traceback would show what this hides.
        raise ConfigError(
            field=field,
            value=shown,
            allowed=error.allowed,
            reason=secrets_hidden(what, url),
            hint=secrets_hidden(error.hint, url),
        ) from None
    if not isinstance(backend, Backend):
        reason = f"{entry.value} is registered as {scheme!r} but makes no backend: {type(backend).__name__}"
        raise ConfigError(field=field, value=shown, allowed=_allowed(), reason=reason)
    return backend


def _allowed() -> str:
    return f"a URL that begins with one of {', '.join(f'{scheme}:' for scheme in known())}; others come as plugins"


def _remedy(entry: EntryPoint) -> str:
    extra = _EXTRAS.get(entry.name)
    if extra is not None and entry.value == _OURS.get(entry.name):
        return f"pip install 'netloader[{extra}]'"
    package = entry.dist.name if entry.dist is not None else entry.module
    return f"install what {package} needs"
