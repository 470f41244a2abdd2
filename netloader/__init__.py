"""Load model weights from a running process that already holds them: a library, a vLLM load format and a command line.

Names are resolved on first use, so importing the package is quick and imports neither torch nor vLLM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from netloader import discovery, observe, sync
    from netloader.api import Server, probe, pull, pull_new
    from netloader.client.probe import Probe
    from netloader.config import Config, load_config
    from netloader.core.addresses import Address, parse_address
    from netloader.core.identity import Difference, ModelIdentity, differences
    from netloader.core.manifest import Manifest, TensorSpec
    from netloader.core.report import Phases, Progress, PullReport, SourceShare
    from netloader.core.sources import Source
    from netloader.discovery import FixedSources, SourceProvider
    from netloader.errors import (
        AttemptFailed,
        ChannelBusy,
        ChannelClosed,
        ConfigError,
        DigestMismatch,
        DiscoveryError,
        LocalProtocolError,
        ManifestError,
        MemoryStillInUse,
        NetloaderError,
        NoSourceLeft,
        PeerLost,
        ProtocolError,
        RefusedError,
        RemoteProtocolError,
        RootMismatch,
        TransferTimeout,
        TransportError,
        TransportUnavailable,
        VerificationError,
    )
    from netloader.observe import Observer
    from netloader.server.session_info import SessionInfo
    from netloader.transports.base import Transport
    from netloader.transports.conformance import check_transport

    __version__: str
    """Version of the installed package."""

__all__ = [
    "Address",
    "AttemptFailed",
    "ChannelBusy",
    "ChannelClosed",
    "Config",
    "ConfigError",
    "Difference",
    "DigestMismatch",
    "DiscoveryError",
    "FixedSources",
    "LocalProtocolError",
    "Manifest",
    "ManifestError",
    "MemoryStillInUse",
    "ModelIdentity",
    "NetloaderError",
    "NoSourceLeft",
    "Observer",
    "PeerLost",
    "Phases",
    "Probe",
    "Progress",
    "ProtocolError",
    "PullReport",
    "RefusedError",
    "RemoteProtocolError",
    "RootMismatch",
    "Server",
    "SessionInfo",
    "Source",
    "SourceProvider",
    "SourceShare",
    "TensorSpec",
    "TransferTimeout",
    "Transport",
    "TransportError",
    "TransportUnavailable",
    "VerificationError",
    "check_transport",
    "differences",
    "discovery",
    "load_config",
    "observe",
    "parse_address",
    "probe",
    "pull",
    "pull_new",
    "sync",
]

_HOMES = {
    "core.addresses": ("Address", "parse_address"),
    "client.probe": ("Probe",),
    "config": ("Config", "load_config"),
    "core.identity": ("Difference", "ModelIdentity", "differences"),
    "api": ("Server", "probe", "pull", "pull_new"),
    "core.manifest": ("Manifest", "TensorSpec"),
    "core.report": ("Phases", "Progress", "PullReport", "SourceShare"),
    "core.sources": ("Source",),
    "discovery": ("FixedSources", "SourceProvider"),
    "observe": ("Observer",),
    "server.session_info": ("SessionInfo",),
    "transports.base": ("Transport",),
    "transports.conformance": ("check_transport",),
}
_MODULES = ("discovery", "observe", "sync")
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"netloader.{name}")
    if name == "__version__":
        return import_module("netloader.core.version").own_version()
    if name in __all__:
        return getattr(import_module(f"netloader.{_HOME_OF.get(name, 'errors')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
