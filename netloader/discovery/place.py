"""Where this process runs, as it is published and compared by those that choose a source."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
from pathlib import Path

from netloader.core.choice import BOOT, HOST, NAME, ZONE, Here
from netloader.core.texts import one_line

__all__ = ["ZONE_VARIABLE", "labels_of", "this_place"]

ZONE_VARIABLE = "NETLOADER_ZONE"
"""Environment variable that names the zone where no other was given: hosts of one fleet share their configuration."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LABEL_LENGTH = 200


def this_place(zone: str | None = None, name: str = "") -> Here:
    """Where this process runs.

    Args:
        zone: The zone; None for that of :data:`ZONE_VARIABLE`, if it is set.
        name: Name of the model.
    """
    if zone is None:
        zone = os.environ.get(ZONE_VARIABLE, "").strip()
    return Here(secrets.token_hex(8), _short(socket.gethostname()), _boot(), _short(zone), _short(name))


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
