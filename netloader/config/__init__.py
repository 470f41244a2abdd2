"""The configuration of a worker: its fields, the files that it may name, and the `Config` struct."""

from netloader.config.config import (
    FORMAT_NAMES,
    HIGHEST_PORT,
    LOWEST_PORT,
    Config,
    ConfigErrors,
    Int8Cache,
    Override,
    PortDecision,
    SourceEntry,
    Token,
    listen_port_for,
    load_config,
)

__all__ = [
    "FORMAT_NAMES",
    "HIGHEST_PORT",
    "LOWEST_PORT",
    "Config",
    "ConfigErrors",
    "Int8Cache",
    "Override",
    "PortDecision",
    "SourceEntry",
    "Token",
    "listen_port_for",
    "load_config",
]
