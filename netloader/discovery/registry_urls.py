"""URLs of registries: several hosts, a user, files for TLS, and the options that every registry has. No I/O."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote

from netloader.core.addresses import ALLOWED_ADDRESS, Address, parse_address
from netloader.errors import ConfigError

__all__ = ["TLS_FILES", "RegistryUrl", "parse_registry_url"]

TLS_FILES = ("ca", "cert", "key")
"""Options that name PEM files: authorities that are trusted instead of the system's, and a client's certificate."""

_COMMON = ("ttl",)

# Not `urlsplit`: it knows one host only, and refuses several in brackets.
_URL = re.compile(r"(?P<scheme>[^:/?#]+)://(?P<hosts>[^/?#]*)(?P<path>[^?#]*)(\?(?P<query>[^#]*))?(?P<fragment>#.*)?")


@dataclass(frozen=True, slots=True)
class RegistryUrl:
    """What a URL of a registry says. Its ``repr`` shows no password.

    Attributes:
        scheme: As given, in lower case.
        hosts: Where the registry listens, in the order given; at least one.
        user: Empty if there is none.
        password: From the URL, otherwise from the environment; empty if there is none.
        path: Without slashes at its ends.
        options: From the query; only names that are allowed.
    """

    scheme: str
    hosts: tuple[Address, ...]
    user: str
    password: str = field(repr=False)
    path: str
    options: Mapping[str, str] = field(repr=False)

    @property
    def shown(self) -> str:
        """The URL without user, password and options."""
        return f"{self.scheme}://{','.join(self.hosts)}{'/' if self.path else ''}{self.path}"

    @property
    def tls(self) -> dict[str, str]:
        """Those of :data:`TLS_FILES` that are given."""
        return {name: self.options[name] for name in TLS_FILES if name in self.options}

    @property
    def ttl(self) -> float:
        """Seconds that a lease lasts.

        Raises:
            ConfigError: The option is no number.
        """
        text = self.options.get("ttl", "15")
        try:
            return float(text)
        except ValueError:
            raise ConfigError(field="ttl", value=text, allowed="seconds", reason="ttl is not a number") from None


def parse_registry_url(
    url: str,
    *,
    port: int,
    password_variable: str,
    secure: bool,
    options: Collection[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> RegistryUrl:
    """Read ``scheme://[user[:password]@]host[:port][,host[:port]...][/path][?option=value&...]``.

    User, password and values may be percent-encoded.

    Args:
        url: The URL.
        port: Where a host has none.
        password_variable: The environment variable with the password, if the URL has none.
        secure: Whether the scheme means TLS: only then are :data:`TLS_FILES` allowed.
        options: Which options are allowed besides ``ttl``.
        environment: By default that of the process.

    Raises:
        ConfigError: Something is wrong with it. Nothing of a user or a password is shown.
    """
    parts = _URL.fullmatch(url)
    if parts is None:
        raise _wrong("", "scheme://host:port", "it is not of the form scheme://host:port")
    user, _, hosts = parts["hosts"].rpartition("@")
    name, _, password = user.partition(":")
    if parts["fragment"]:
        raise _wrong("#", "no fragment (#)", "it has a fragment; write # as %23")
    allowed = (*_COMMON, *options, *(TLS_FILES if secure else ()))
    found: dict[str, str] = {}
    for option, value in parse_qsl(parts["query"] or "", keep_blank_values=True):
        if option not in allowed:
            what = f"there is no option {option!r}"
            if option in TLS_FILES:
                what = f"the option {option!r} needs TLS, which this scheme is without"
            raise _wrong(option, f"the options {', '.join(sorted(allowed))}", what)
        if option in found or not value:
            raise _wrong(option, "each option once, with a value", f"the option {option!r} is empty or given twice")
        found[option] = value
    if "key" in found and "cert" not in found:
        raise _wrong("key", "cert and key together", "a key is given without its certificate (cert)")
    return RegistryUrl(
        scheme=parts["scheme"].lower(),
        hosts=tuple(_host(host, port) for host in hosts.split(",")),
        user=unquote(name),
        password=unquote(password) or environment.get(password_variable, ""),
        path=unquote(parts["path"]).strip("/"),
        options=found,
    )


def _host(text: str, port: int) -> Address:
    if not text:
        raise _wrong("", "host:port", "it names no host, or there is a comma too many")
    bare = text.endswith("]") if text.startswith("[") else ":" not in text
    try:
        return parse_address(f"{text}:{port}" if bare else text)
    except ConfigError as error:
        raise _wrong(text, ALLOWED_ADDRESS, f"{text!r} is no address: {error.reason}") from None


def _wrong(value: str, allowed: str, reason: str) -> ConfigError:
    return ConfigError(field="discovery", value=value, allowed=allowed, reason=reason)
