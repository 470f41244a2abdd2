"""The configuration of one worker, read from a mapping and its ``CONFIG_FILE``.

Reading is strict. Each given value is checked, also one that the file overrides, and all faults are reported at once. A
typing error must not turn into a default, because the engine would start and load from storage without notice.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import msgspec

from netloader.config.fields import FIELDS, FORMAT_NAMES, ConfigErrors, Faults, Int8Cache, Origin, SourceEntry, key_text
from netloader.config.files import Token, from_file, read_config_file, read_token
from netloader.core.addresses import Address
from netloader.core.urls import Url
from netloader.errors import ConfigError, shown

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

LOWEST_PORT = 1024
HIGHEST_PORT = 65535

_MOST_RANKS_NAMED = 16

# Keys of vLLM's own loaders that users mix with the fields of netloader.
_LOADER_KEYS = ("enable_multithread_load", "num_threads", "concurrency", "memory_limit", "distributed", "pattern")
_SECRET_KEY = re.compile("token|secret|passw|credential|key", re.IGNORECASE)


class Override(msgspec.Struct, frozen=True):
    """A field that is given both in ``CONFIG_FILE`` and inline. The value of the file is used.

    Attributes:
        field: Name of the field.
        inline: The value that is not used, as text.
        from_file: The value that is used, as text.
    """

    field: str
    inline: str
    from_file: str

    def __str__(self) -> str:
        return f"{self.field}: {self.from_file} from CONFIG_FILE is used instead of {self.inline}"


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration of one worker; docs/configuration.md explains each field.

    Made by :func:`load_config`, which checks the values; the constructor does not. The attributes are named like the
    fields, in lower case. None means that the field was omitted (or is ``null``). Times are in seconds.

    Attributes:
        transport: Names in order of preference; None lets both sides choose.
        max_bandwidth: In bytes per second.
        discovery: URLs of registries. Their text shows no password.
        token: Contents of ``TOKEN_FILE``.
        overrides: Each field that ``CONFIG_FILE`` overrode, for the log.
        warnings: Values that are allowed but probably not intended, for the log.
    """

    source: tuple[SourceEntry, ...] | None = None
    model: str | None = None
    listen_port: int | None = None
    int8_cache: Int8Cache = "no"
    int8_cache_name: tuple[str, ...] | None = None
    output_prefix: str | None = None
    config_file: str | None = None
    fallback: bool = True
    fallback_format: str = "auto"
    fallback_config: Mapping[str, object] = {}
    wait: float = 0.0
    timeout: float = 1200.0
    stall_timeout: float = 30.0
    transport: tuple[str, ...] | None = None
    expect_root: str | None = None
    serve: bool = True
    listen_host: str | None = None
    max_clients: int = 8
    fan_out: int = 1
    relay: bool = True
    relay_grace: float = 0.0
    stripe: int = 4
    keep_raw: bool = True
    token_file: str | None = None
    draft_model: str | None = None
    discovery: tuple[Url, ...] | None = None
    zone: str | None = None
    origin: Origin = "any"
    max_bandwidth: float | None = None
    token: Token | None = None
    overrides: tuple[Override, ...] = ()
    warnings: tuple[str, ...] = ()

    def sources_for(self, rank: int) -> tuple[Address, ...]:
        """Addresses that `rank` may pull from, in order; empty when there are none."""
        for entry in self.source or ():
            if entry.device_id == rank:
                return entry.sources
        return ()

    def why_no_source(self, rank: int) -> str | None:
        """Why :meth:`sources_for` is empty for `rank`; None when it is not."""
        if self.source is None:
            return "SOURCE omitted"
        if not self.source:
            return "SOURCE is empty"
        ranks = sorted(entry.device_id for entry in self.source)
        if rank in ranks:
            return None if self.sources_for(rank) else f"SOURCE lists no address for rank {rank}"
        named = ", ".join(shown(known, 20) for known in ranks[:_MOST_RANKS_NAMED])
        more = f" and {len(ranks) - _MOST_RANKS_NAMED} more" if len(ranks) > _MOST_RANKS_NAMED else ""
        return f"SOURCE has no entry for rank {rank}; it has {named}{more}"

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={text}' for name, text in self._visible())})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return list(self._visible())

    def _visible(self) -> Iterator[tuple[str, str]]:
        for field in FIELDS.values():
            yield field.attribute, field.show(getattr(self, field.attribute))


class PortDecision(msgspec.Struct, frozen=True):
    """Which port a rank's server listens on.

    Attributes:
        port: The port; 0 lets the kernel choose a free one; None means that no listener is opened.
        reason: The reason for the decision, for the log.
        warning: A warning for the user, or None.
    """

    port: int | None
    reason: str
    warning: str | None = None

    @property
    def listens(self) -> bool:
        """Whether a listener is opened at all."""
        return self.port is not None


def listen_port_for(config: Config, rank: int) -> PortDecision:
    """Decide on which port the server of `rank` listens.

    Does not raise. With a port outside 1024-65535 no listener is opened; the model is loaded nevertheless.
    """
    if not config.serve:
        return PortDecision(None, "SERVE is false")
    if config.listen_port is None:
        return PortDecision(0, "LISTEN_PORT omitted, a free port is chosen")
    port = config.listen_port + rank
    total = f"LISTEN_PORT + RANK = {shown(config.listen_port, 20)} + {rank} = {shown(port, 20)}"
    if LOWEST_PORT <= port <= HIGHEST_PORT:
        return PortDecision(port, total)
    reason = f"{total} is outside {LOWEST_PORT}-{HIGHEST_PORT}"
    warning = f"{reason}: rank {rank} opens no listener and serves nobody; its model is loaded all the same"
    return PortDecision(None, reason, warning)


def load_config(extra: Mapping[str, object] | None = None) -> Config:
    """Read the configuration.

    Args:
        extra: The fields by name, as ``--model-loader-extra-config`` gives them; None means ``{}``.

    Returns:
        The configuration, with ``CONFIG_FILE`` and ``TOKEN_FILE`` read.

    Raises:
        ConfigError: One or more fields are not valid. The message names each with its value and the allowed values.
    """
    given = _mapping(extra)
    faults = Faults()
    values = _read_fields(given, faults)
    overrides: tuple[Override, ...] = ()
    path = values.get("config_file")
    if path is not None:
        with faults:
            contents = read_config_file(path)
            in_file = Faults()
            values |= _read_fields(contents, in_file, inside=True)
            faults.found += [from_file(error, path) for error in in_file.found]
            overrides = tuple(
                Override(name, FIELDS[name].show(given[name]), FIELDS[name].show(contents[name]))
                for name in FIELDS
                if name in contents and name in given and name != "CONFIG_FILE"
            )
    token, warnings = None, list[str]()
    if not faults.found:
        with faults:
            _check_times(Config(**values))
        with faults:
            _check_origin(Config(**values))
    with faults:  # also when fields are not valid: all faults are named at once
        token_file = values.get("token_file")
        token = None if token_file is None else read_token(token_file, warnings)
    faults.raise_all()
    config = Config(**values, overrides=overrides)
    if config.int8_cache_name is not None and config.int8_cache == "no":
        warnings.append("INT8_CACHE_NAME has no effect while INT8_CACHE is 'no'")
    return msgspec.structs.replace(config, token=token, warnings=tuple(warnings))


def _mapping(extra: object) -> Mapping[Any, object]:
    if extra is None:
        return {}
    if not isinstance(extra, Mapping):
        reason = f"it is of type {type(extra).__name__}"
        raise ConfigError(field="model_loader_extra_config", value=extra, allowed="one object", reason=reason)
    return extra


def _read_fields(given: Mapping[Any, object], faults: Faults, *, inside: bool = False) -> dict[str, Any]:
    """Read every field of `given`, and add the errors to `faults`. `inside`: `given` comes from a CONFIG_FILE."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        with faults:
            field = FIELDS.get(key) or _reject_key(key, value)
            if inside and key == "CONFIG_FILE":
                field.reject(value, "a CONFIG_FILE inside CONFIG_FILE is refused", "put all fields into one file")
            values[field.attribute] = field.read(value)
    return values


def _reject_key(key: object, value: object) -> NoReturn:
    text = key_text(key)
    near = difflib.get_close_matches(text.upper(), FIELDS, n=1)
    hint = f"did you mean {near[0]}?" if near else ""
    if key in _LOADER_KEYS:
        hint = "settings of the default loader go into FALLBACK_CONFIG"
    if _SECRET_KEY.search(text):
        value = Token(b"")  # hides the value: under a misspelt TOKEN_FILE it may be the secret itself
        if "TOKEN_FILE" not in hint:
            hint = "a secret is given as the path of a file, in TOKEN_FILE"
    raise ConfigError(field=text, value=value, allowed=", ".join(FIELDS), reason="unknown field", hint=hint)


def _check_times(config: Config) -> None:
    if config.wait >= config.timeout:
        raise ConfigError(
            field="WAIT",
            value=config.wait,
            allowed=f"less than TIMEOUT ({config.timeout:g} s), which covers the waiting too",
            hint="raise TIMEOUT",
        )


def _check_origin(config: Config) -> None:
    """Whether its registry can give leases is checked where it is opened."""
    if config.origin != "lease":
        return
    if not config.discovery:
        missing, hint = "there is no DISCOVERY", "set DISCOVERY, in which the engines agree on one, or leave ORIGIN out"
    elif not config.serve:
        missing, hint = "SERVE is false, so that others would wait in vain", "leave SERVE or ORIGIN out"
    else:
        return
    allowed = "'any'; 'lease' with a DISCOVERY that gives leases, and SERVE"
    raise ConfigError(field="ORIGIN", value=config.origin, allowed=allowed, reason=missing, hint=hint)
