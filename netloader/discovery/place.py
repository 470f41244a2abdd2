"""Where this process runs, as it is published and compared by those that choose a source."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
from pathlib import Path

from netloader.config.fields import ALLOWED_ZONE, is_zone
from netloader.core.choice import BOOT, HOST, NAME, ZONE, Here
from netloader.core.texts import one_line
from netloader.errors import ConfigError

__all__ = ["ZONE_VARIABLE", "labels_of", "this_place", "zone_of"]

ZONE_VARIABLE = "NETLOADER_ZONE"
"""Environment variable that names the zone where no other was given: hosts of one fleet share their configuration."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LABEL_LENGTH = 200


def zone_of(given: object, *, field: str = "zone") -> str:
    """The zone of this process: the given one, else that of :data:`ZONE_VARIABLE`, else empty.

    Raises:
        ConfigError: One of the two is given and is not the name of a zone.
    """
    variable = os.environ.get(ZONE_VARIABLE, "").strip()
    if given is None and not variable:
        return ""
    name, zone = (ZONE_VARIABLE, variable) if given is None else (field, given)
    if not isinstance(zone, str) or not is_zone(zone):
        raise ConfigError(field=name, value=zone, allowed=ALLOWED_ZONE)
    return zone


def this_place(zone: str = "", name: str = "") -> Here:
    """Where this process runs. Reads a file.

    Args:
        zone: The zone; empty for none.
        name: Name of the model.
    """
    return Here(secrets.token_hex(8), _short(socket.gethostname()), _boot(), zone, _short(name))


def labels_of(here: Here) -> dict[str, str]:
    """The labels under which a server at this place is published, without those that are not known."""
    labels = {HOST: here.host, BOOT: here.boot, ZONE: here.zone, NAME: here.name}
    return {label: text for label, text in labels.items() if text}


def _boot() -> str:
    try:
        return hashlib.sha256(b"netloader place " + _BOOT_ID.read_bytes().strip()).hexdigest()[:16]
    except OSError:  # not Linux, or hidden from this container
        return ""


def _short(text: str) -> str:
    return one_line(text.encode(errors="replace").decode(), _LABEL_LENGTH)
